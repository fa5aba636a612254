"""Random trouble around the jobs that users run: signals, full disks, folders that go, clocks that jump.

    python -m tests.chaos --seed 7       one scenario
    make test-chaos                      twenty, about ten minutes on two quiet cores

No part of the default test run. What must hold, whatever happens: no finished trial is lost or asked twice, no file of
the user's is touched, and every job's end has one line that says what happened and what to do.
"""
