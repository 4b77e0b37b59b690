"""What a finished run is worth: its scores on its tasks, on unseen tasks and on benchmarks, through lm-eval.

``records`` is the format of ``evaluation.json`` and imports nothing of lm-eval, so that reports can read it anywhere.
``model`` opens a folder in lm-eval, ``benchmarks`` are lm-eval's own tasks, ``questions`` those of a run and others in
the same form, and ``mt_bench`` writes answers for the judges of MT-bench. The recipe is ``mixture_eval``.
"""
