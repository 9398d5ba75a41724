"""Conversions under faults: kills, signals, full disks, failed calls to the system, sources that change.

`python -m tests.faults --minutes 5 --seed 1` draws what is converted, how, and what goes wrong when; then it checks that
nothing is lost and that nothing looks whole that is not. `cases` says what is drawn, `checks` what must hold, `injection`
how a fault comes about within the process that it hits.
"""
