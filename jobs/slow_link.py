"""Where do compressed gradients pay? A training step of two ranks over a link of 1 and of 10 Gbit/s, codec by codec.

    sudo python jobs/slow_link.py                          # two network namespaces of this machine, throttled by tc
    sudo python jobs/slow_link.py --megabits 100 --layers 2

Prints the mean step and the bytes that a rank sends in one. Measure on a quiet machine with two cores or more.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace

from raybsa.experiments.compared import codec_label
from raybsa.experiments.options import at_least
from raybsa.experiments.place import FAILED, ending, interruptible, refusing
from raybsa.experiments.slow_link import over_links
from raybsa.experiments.suites import COMPRESSION, compression

CODECS = ("none", "bf16", "int8", {"name": "powersgd", "params": {"rank": 8}})
INT8_FACTORS = tuple({"name": "powersgd", "params": {"rank": rank, "wire": "int8"}} for rank in (32, 9))


def main() -> int:
    arguments = _arguments()
    with refusing():
        base = replace(COMPRESSION, num_layers=arguments.layers, train_steps=arguments.steps)
    plain = compression(base, seeds=1)[0]
    codecs = [codec if isinstance(codec, dict) else {"name": codec, "params": {}} for codec in (*CODECS, *INT8_FACTORS)]
    specs = [replace(plain, task_params={**plain.task_params, "codec": codec}) for codec in codecs]
    print(f"{'Mbit/s':>8s}  {'codec':28s}{'ms a step':>10s}{'kB a step':>11s}{'times faster':>14s}")
    uncompressed = 0.0
    for found in over_links(specs, arguments.megabits):
        if found.codec["name"] == "none":
            uncompressed = found.step_ms
        print(
            f"{found.megabits:8d}  {codec_label(found.codec):28s}{found.step_ms:10.1f}{found.sent_bytes / 1e3:11.1f}"
            f"{uncompressed / found.step_ms:14.2f}",
            flush=True,
        )
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--megabits", type=at_least(1), nargs="+", default=[1_000, 10_000], help="per second and direction"
    )
    parser.add_argument("--layers", type=int, default=2, help="of the byte model: 0.85 M parameters each")
    parser.add_argument("--steps", type=int, default=60)
    return parser.parse_args()


if __name__ == "__main__":
    with interruptible("the same command begins anew"), ending(FAILED, OSError, RuntimeError, ValueError):
        sys.exit(main())
