"""A whole run: the destination, the journal, what is done and left, finishing, verification, comparison.

run           the order of a run's calls
destination   where a run keeps its files; who may write there
standing      what a destination holds, and whether a run resumes it
clearing      making room for a run; removing an unfinished one
items         a plan as work items, in batches
journal       what a run has done
finisher      what gives files their final names
record        `conversion.json`: what a finished run reports
progress      what callbacks receive
verification  is a destination what its plan says
comparison    how two checkpoints differ
"""

__version__ = "0.1.0"
"""Of this program: on record in `conversion.json`, and `streamconv.__version__`."""
