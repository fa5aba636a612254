"""Trains a small byte model with dense attention and saves what its layers attend with.

    python -m raybsa.tasks.captured_lm --out qkv.pt
    python -m raybsa.tasks.fidelity qkv.pt --block-size 16 --held-out 4

The first samples are windows of the training text that it has not been trained on, the last four of the held-out text.
"""

from __future__ import annotations

import argparse
from contextlib import nullcontext

import torch

from raybsa.spec import DENSE, AttentionSpec, TrialSpec
from raybsa.tasks.byte_lm import ByteText, bits_per_byte
from raybsa.tasks.capture import Captured, capture, save_calls
from raybsa.tasks.model import Transformer
from raybsa.tasks.training import Training
from raybsa.timing import DeviceLock

HELD_OUT = 4


def main() -> None:
    arguments = _arguments()
    device = torch.device(arguments.device)
    spec = TrialSpec(
        "byte_lm",
        (AttentionSpec(DENSE),),
        train_len=arguments.tokens,
        train_steps=arguments.steps,
        learning_rate=arguments.learning_rate,
        num_layers=arguments.layers,
        num_heads=arguments.heads,
        head_dim=arguments.head_dim,
        task_params={"text": arguments.text, "train_batch": arguments.batch},
    )
    text, lock = ByteText(spec, device), DeviceLock(device)
    model = Transformer(spec, 256).to(device)
    tokens, targets = text.held_out()
    training = Training(
        model,
        text.batches,
        lambda: bits_per_byte(model, tokens, targets, nullcontext(), lock),
        name="bits_per_byte",
        goal="min",
        steps=spec.train_steps,
        learning_rate=spec.learning_rate,
        lock=lock,
        context=nullcontext(),
    )
    print(f"{training.advance().value:.4f} bits per held-out byte")
    unseen = [text.batches(arguments.steps + i)[0] for i in range(-(-arguments.samples // arguments.batch))]
    windows = torch.cat([*unseen, tokens[:: len(tokens) // HELD_OUT][:HELD_OUT]])
    calls: list[Captured] = []
    with torch.no_grad(), capture(model.eval(), calls):
        model(windows)
    save_calls(calls, arguments.out)
    print(f"{len(calls)} calls with q {tuple(calls[0].q.shape)} in {arguments.out}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--out", required=True, help="the file to write")
    parser.add_argument("--text", help="file or folder to train on (the Python standard library's sources)")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--learning-rate", type=float, default=4e-3)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--head-dim", type=int, default=32)
    parser.add_argument("--samples", type=int, default=48, help="windows besides the held-out ones")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


if __name__ == "__main__":
    main()
