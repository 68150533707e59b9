"""Records for people: tables on the terminal (`terminal.py`), and a page that can be sent to somebody (`write.py`).

A page is put together in this order: `runs.py` reads evaluations, `cases.py` chooses expressions to show and lays boxes and patches over
their images, `choices.py` asks every pruner what it would keep, `plots.py` draws, and `page.py` writes all of it into one text.
"""
