"""The stages: each is an idempotent function that reads files and writes files.

``synth.generate``, ``prepare.prepare``, ``baseline.baseline``, ``train.train``,
``memorize.memorize``, ``evaluate.evaluate``, ``recommend.recommend``, ``similar.similar``,
``export.export``, ``gate.gate``, ``publish.publish`` and ``publish.rollback``.
"""
