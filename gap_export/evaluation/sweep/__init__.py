"""Many pruners at many ratios in one table: what is asked (`request.py`), answered (`run.py`), stored (`record.py`) and shown."""
