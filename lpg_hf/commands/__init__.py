"""
The command line `lpg-hf`: `train`, `issues`, `report` and `compare`.

`python -m lpg_hf.commands` is the same, also for `accelerate launch -m`. No module outside of this package imports it.
"""
