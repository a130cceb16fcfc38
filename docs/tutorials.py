"""Four short tutorials. Every block of code in them is run by the tests.

.. include:: add-a-drafter.md
.. include:: add-a-decoder.md
.. include:: run-on-your-model.md
.. include:: read-the-report.md
"""
