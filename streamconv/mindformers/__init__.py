"""The flags of MindFormers' `convert_weight.py`: `python -m streamconv.mindformers`."""
