"""``tune report``: one page that shows a run, or compares several.

``page`` writes it. ``page`` and ``figures`` need the extra ``report``; ``read``, ``tables`` and ``evaluation``, which
scripts use, do not.
"""
