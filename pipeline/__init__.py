"""The stages: each is a function that reads files and writes files, and nothing when asked again.

``synth.generate``, ``prepare.prepare``, ``train.train``, ``evaluate.evaluate``, ``gate.gate``,
``recommend.recommend``, ``export.export``, ``publish.publish`` and ``publish.rollback``.
"""
