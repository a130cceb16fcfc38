"""What every figure means, once: tables, exports and the page quote these."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Definition:
    """A figure's short name, its formula, and one sentence for whoever reads it first."""

    name: str
    formula: str
    meaning: str


DEFINITIONS: Mapping[str, Definition] = {
    "seconds": Definition(
        "seconds per answer",
        "mean over questions of t",
        "t is the wall-clock time of one answer from submission to its last token; repeats are averaged per question.",
    ),
    "speedup": Definition(
        "speed-up",
        "Σ t(plain) ÷ Σ t(strategy)",
        "Sums run over the questions that both answered: how much sooner the whole set is done.",
    ),
    "speedup_geometric": Definition(
        "speed-up, geometric mean",
        "exp( mean of ln( t(plain) ÷ t(strategy) ) )",
        "Every question weighs the same, however long its answer.",
    ),
    "speedup_per_token": Definition(
        "speed-up per token",
        "( Σ t(plain) ÷ Σ n(plain) ) ÷ ( Σ t(strategy) ÷ Σ n(strategy) )",
        "n counts new tokens; differs from the speed-up where a strategy writes longer or shorter answers.",
    ),
    "interval": Definition(
        "95 % interval",
        "BCa bootstrap, questions drawn with replacement, both strategies together",
        "Where the figure would lie for other questions like these, not on other machines or models; below five "
        "questions none is given.",
    ),
    "p_value": Definition(
        "p",
        "sign-flip test of ln( t(plain) ÷ t(strategy) ), Holm-corrected over strategies",
        "The chance of so large a difference if the strategy were as fast as plain decoding.",
    ),
    "category_p_value": Definition(
        "p within a category",
        "sign-flip test of ln( t(plain) ÷ t(strategy) ), Holm-corrected over strategies and categories",
        "As p, with the questions of one category alone; many cells are looked at, so each must show more.",
    ),
    "detectable": Definition(
        "detectable",
        "exp( (t₀.₉₇₅ + t₀.₈) · s ÷ √n ), s = standard deviation of ln( t(plain) ÷ t(strategy) )",
        "The smallest true speed-up that a run of this size would notice four times out of five, taken alone at a "
        "level of 5 %; Holm's correction asks for somewhat more.",
    ),
    "tokens": Definition(
        "tokens",
        "mean over questions of n",
        "New tokens per answer, intermediate text such as an outline included; one counter for all strategies.",
    ),
    "forwards": Definition(
        "forwards",
        "mean over questions of the target's forward passes after prefill",
        "Passes in which several sequences of one answer took part count once.",
    ),
    "tokens_per_forward": Definition(
        "tokens per forward",
        "Σ tokens after prefill ÷ Σ forwards",
        "All sequences of an answer together; plain decoding has 1.",
    ),
    "acceptance_length": Definition(
        "acceptance length",
        "Σ tokens after prefill ÷ Σ (forwards × sequences in them)",
        "Tokens that one sequence gains per pass, bonus token included; plain decoding has 1.",
    ),
    "revised": Definition(
        "revised",
        "mean over questions of the tokens changed or masked again",
        "Masked refinement alone may take back what it has written; guesses of other strategies are no text yet.",
    ),
    "position": Definition(
        "confirmed at position j",
        "blocks whose first j guesses were all confirmed ÷ blocks that guessed at least j",
        "In a tree, positions count nodes, and blocks that drafted as many: read the shares as lower bounds.",
    ),
    "step_price": Definition(
        "price of a step",
        "median over steps of n tokens of the forward pass's seconds",
        "n counts the tokens of all sequences in the step. A large mark is a strategy's mean n and mean price.",
    ),
    "roof": Definition(
        "roof",
        "max( t(1), n · t(N) ÷ N ), ridge at N · t(1) ÷ t(N)",
        "t(1) is the price of the smallest step, N the largest measured: below the ridge reading the weights takes "
        "the time, above it arithmetic does.",
    ),
    "shares": Definition(
        "shares of the time",
        "mean over answers of Σ plan, Σ forward and Σ commit over its steps; rest = t − their sum",
        "Choosing blocks (plan) includes drafting; the rest is waiting, text handling and steps of other answers.",
    ),
    "identical": Definition(
        "same as plain",
        "answers with exactly plain decoding's tokens ÷ answers compared",
        "A strategy that promises losslessness must reach all of them, ties aside.",
    ),
    "similarity": Definition(
        "similarity to plain",
        "mean of 2·LCS(words) ÷ (words + words of plain)",
        "ROUGE-L F1 against plain decoding's answer; says how alike the texts are, not which one is better.",
    ),
    "quality": Definition(
        "quality",
        "mean over questions of the mean of the question's measures (0 to 1)",
        "Which measures apply depends on the question: exact match, overlap with a reference, a judge.",
    ),
    "net_win_rate": Definition(
        "net win rate",
        "( wins − losses ) ÷ pairs of answers that a judge compared in both orders",
        "Against plain decoding, from −1 to 1; a win needs both orders to agree. How an answer reads, not whether it "
        "is right.",
    ),
    "net_win_rate_lenient": Definition(
        "either order",
        "net win rate, the two orders' verdicts (1, 0, −1) added and their sign taken",
        "A win and a tie make a win: Skeleton-of-Thought's convention, where the other is FastChat's.",
    ),
    "net_win_rate_length": Definition(
        "at equal length",
        "2σ(a) − 1 of P(win) = σ( a + b · tanh( Δ ÷ s ) ), Δ = difference in characters, s = its deviation",
        "What is left of the net win rate where both answers are equally long: judges favour long ones.",
    ),
    "drift": Definition(
        "drift",
        "exp( slope of ln t(step) over the run, Theil–Sen ) − 1, p by Kendall's τ; flagged above 5 % with p < 0.01",
        "t(step) is the median of plain decoding's steps in one answer; repeats are measured against their question.",
    ),
    "outlier": Definition(
        "far from the usual",
        "| ln t(step) − median | > 5 × 1.4826 × the median of such distances, and > ln 1.15",
        "Something else used the machine, or let go of it, while this answer was made.",
    ),
    "peak_memory": Definition("peak memory", "largest over answers", "Most memory in use while an answer was made."),
    "failures": Definition(
        "failures", "answers that ended in an error or were cancelled", "They count in no other figure."
    ),
}

OF_TWO_RUNS: Mapping[str, Definition] = {
    "speedup": DEFINITIONS["speedup"],
    "faster": Definition(
        "faster by",
        "Σ t(first run) ÷ Σ t(second run)",
        "Sums run over the questions that the strategy answered in both runs; above 1 the second run is faster.",
    ),
    "agree": Definition(
        "agree",
        "each run's speed-up lies within the other's 95 % interval",
        "Two runs of the same configuration should; a dash stands where one of them has no interval.",
    ),
    "same_tokens": Definition(
        "same tokens",
        "answers with the same tokens in both runs ÷ answers in both",
        "Greedy and seeded strategies must reach all of them on the same machine.",
    ),
    "interval": DEFINITIONS["interval"],
}
"""The figures of a comparison of two runs."""
