"""Training of heads that draft: data made by the target itself, features, losses, and the loop.

`python -m drafters.training.distill` collects answers, `python -m drafters.training.eagle` and
`python -m drafters.training.medusa` train on them (and collect them first, if nobody has).

The `speculators` library (0.9) has classes and a loop for such heads, too. Its checkpoint layout is the one written
here, and its classes are what heads are compared with in the tests; the rest is this project's own. The library takes
its data from a vLLM server, unrolls over whole packed rows with FlexAttention, freezes the output matrix, and needs
Python 3.11 and torchvision, torchaudio and datasets; here answers come from this project's engine, what is unrolled
is only what is learned from (on a CPU most of the cost), and the output matrix, which starts as the target's, is
trained.
"""
