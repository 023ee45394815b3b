"""The stages: each is an idempotent function that reads files and writes files.

``synth.generate``, ``prepare.prepare``, ``train.train``, ``evaluate.evaluate``, ``gate.gate``,
``recommend.recommend``, ``export.export``, ``publish.publish`` and ``publish.rollback``.
"""
