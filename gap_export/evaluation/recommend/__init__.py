"""How many visual tokens to keep, and by which pruner: shares of one bundle (`bundle.py`), or pruners and shares together (`run.py`)."""
