"""Which drafted tokens to keep: verification of trees, batched over sequences.

A tree is `tokens` `[S, N]` and `parents` `[S, N]`, rows of both padded with -1. A parent is the index of a node,
or -1 for the children of the committed text (the root). Parents come before their children, siblings in the
order in which they were drawn. A node whose token is -1 is never kept, nor is anything below it: so a
distribution may run out of tokens to draw without changing the shape of the tree.

`target_probs` `[S, N + 1, V]` holds the target's distribution at the root (index 0) and behind node n (index
n + 1); `draft_probs`, of the same shape, the distribution that the children of each were drawn from, before any
of them was taken out (rows of nodes without children are never looked at).

`u` `[S, N + 1]` are independent uniforms: column 0 draws the final token, column 1 + n tests node n.

`verify_tree_greedy`, `verify_tree_topk`, `verify_tree_sampled` and `verify_traversal` are lossless for the
trees they are made for; `typical_acceptance` is not. Losslessness needs the shape of the tree to be fixed
before its tokens are drawn. Nothing here waits for an accelerator, see `rows_worth_visiting`; on the CPU,
work across the vocabulary is done for rejected nodes only.
"""

from __future__ import annotations

import torch
from torch import Tensor

from decoding.engine.sampling import draw, rows_worth_visiting
from decoding.engine.verify import Verdict


def verify_tree_greedy(tokens: Tensor, parents: Tensor, target_argmax: Tensor) -> Verdict:
    """Keep the longest branch on which every node is the target's choice; target_argmax is `[S, N + 1]`."""
    chosen = target_argmax.gather(1, parents + 1)
    end = _deepest(parents, (tokens == chosen) & (tokens >= 0))
    return _verdict(parents, end, target_argmax.gather(1, end[:, None])[:, 0])


def verify_tree_topk(tokens: Tensor, parents: Tensor, target_probs: Tensor, u: Tensor) -> Verdict:
    """Lossless for deterministic children, such as a drafter's k most likely tokens (EAGLE-2, EAGLE-3).

    Children are tried in turn: x is kept with probability p(x); if not, p(x) becomes 0 and p is normalized.
    Since no draft distribution is involved, all nodes are tested at once.
    """
    valid = tokens >= 0
    p = _token_probs(target_probs, tokens, parents)  # [S, N]
    siblings = _elder_siblings(parents, valid)
    twin = (siblings & (tokens[:, :, None] == tokens[:, None, :])).any(-1)
    p = p.masked_fill(twin | ~valid, 0.0)  # the elder twin has already taken this token's probability
    left = (1 - (siblings * p[:, None, :]).sum(-1)).clamp(min=0)  # [S, N] when a node's turn comes
    passed = u[:, 1:] * left < p
    passed &= ~(siblings & passed[:, None, :]).any(-1)  # the first to pass is taken
    end = _deepest(parents, passed)
    target = target_probs[torch.arange(len(end), device=end.device), end]  # [S, V]
    tried = valid & (parents + 1 == end[:, None])
    rest = target.scatter_reduce(1, tokens.clamp(min=0), 1.0 - tried.to(target.dtype), "prod")
    some = rest.sum(-1, keepdim=True) > 0
    return _verdict(parents, end, draw(torch.where(some, rest, target), u[:, 0]))


def verify_tree_sampled(
    tokens: Tensor, parents: Tensor, target_probs: Tensor, draft_probs: Tensor, u: Tensor, *, replacement: bool
) -> Verdict:
    """Lossless for children drawn independently (`replacement`) or one after the other without replacement.

    Multi-round rejection sampling (SpecInfer, Miao et al. 2024): the children of a kept node are tried in
    turn, x is kept with probability min(1, p(x) / q(x)), and a rejection turns p into max(p - q, 0),
    normalized; without replacement it also takes x out of q.
    """
    rest = _Rest(tokens, parents, target_probs, draft_probs, replacement)
    end = tokens.new_zeros(len(tokens))
    for node in range(tokens.shape[1]):
        tried = (tokens[:, node] >= 0) & (parents[:, node] + 1 == end)
        if not len(rows_worth_visiting(tried)):
            continue
        p, q = rest.token(node)
        passed = tried & (u[:, 1 + node] * q < p)
        rest.subtract(node, tried & ~passed, torch.ones_like(p))
        end = torch.where(passed, node + 1, end)
    return _verdict(parents, end, draw(rest.distribution(end), u[:, 0]))


def verify_traversal(
    tokens: Tensor, parents: Tensor, target_probs: Tensor, draft_probs: Tensor, u: Tensor, *, replacement: bool
) -> Verdict:
    """Lossless for the same trees as `verify_tree_sampled`, keeping more (Traversal Verification, Weng et al. 2025).

    From the leaves up: a node is tested once everything below it has been rejected, and if it passes, the
    whole branch down to it is kept. On a chain this is block verification. `kept` is the probability
    with which the branch down to a node may be kept, given all that has been rejected so far.
    """
    count = tokens.shape[1]
    rest = _Rest(tokens, parents, target_probs, draft_probs, replacement)
    kept = target_probs.new_ones((len(tokens), count + 1), dtype=torch.double)
    row = torch.arange(len(tokens), device=tokens.device)
    end = tokens.new_zeros(len(tokens))
    is_open = torch.ones_like(end, dtype=torch.bool)
    nodes, leaving = _walk(parents)
    for moment in range(2 * count):
        if not len(rows_worth_visiting(is_open)):
            break
        node, leaves = nodes[:, moment], leaving[:, moment]
        above = parents[row, node] + 1
        valid = is_open & (tokens[row, node] >= 0)
        p, q = rest.token(node)
        ratio = torch.where(q > 0, p / q, (p > 0).double())
        entered = (kept[row, above] * ratio).clamp(max=1) * (tokens[row, node] >= 0)
        passed = valid & leaves & (u[row, 1 + node] < kept[row, node + 1])
        failed = valid & leaves & ~passed
        excess = rest.subtract(node, failed, kept[row, above])
        stop = excess + 1 - kept[row, above]
        lowered = torch.where(stop > 0, excess / stop, 1.0)
        kept[row, above] = torch.where(failed, lowered, kept[row, above])
        kept[row, node + 1] = torch.where(leaves, kept[row, node + 1], entered)
        end = torch.where(passed, node + 1, end)
        is_open = is_open & ~passed
    return _verdict(parents, end, draw(rest.distribution(end), u[:, 0]))


def typical_acceptance(
    tokens: Tensor,
    parents: Tensor,
    target_probs: Tensor,
    u: Tensor,
    *,
    threshold: float = 0.3,
    entropy_scale: float = 0.09,
) -> Verdict:
    """LOSSY: changes the distribution of the output (Medusa, Cai et al. 2024).

    Keeps the longest branch whose every node has p(x) > min(threshold, entropy_scale · exp(-H(p))), H in
    nats: where the target itself is unsure, any plausible token will do. The final token is drawn from p.
    """
    entropy = [torch.special.entr(target_probs[:, i]).sum(-1) for i in range(target_probs.shape[1])]
    least = (entropy_scale * torch.exp(-torch.stack(entropy, dim=1))).clamp(max=threshold)  # [S, N + 1]
    p = _token_probs(target_probs, tokens, parents)
    end = _deepest(parents, (p > least.gather(1, parents + 1)) & (tokens >= 0))
    target = target_probs[torch.arange(len(end), device=end.device), end]
    return _verdict(parents, end, draw(target, u[:, 0]))


class _Rest:
    """What is left of the target's distribution at every node as its children are rejected one by one.

    After any number of rejections that is max(scale · p - spent · q, 0) for two numbers per node, because
    max(max(a, 0) - b, 0) = max(a - b, 0) for b ≥ 0. So no copy of `[S, N + 1, V]` is ever made. Taking
    rejected tokens out of q only changes q's normalization (`rarity`): their rest is 0 already, or they
    would not have been rejected.
    """

    def __init__(self, tokens: Tensor, parents: Tensor, target: Tensor, drafted: Tensor, replacement: bool) -> None:
        self.tokens, self.parents, self.target, self.drafted = tokens, parents, target, drafted
        self.replacement = replacement
        self.row = torch.arange(len(tokens), device=tokens.device)
        self.scale = target.new_ones(target.shape[:2], dtype=torch.double)  # [S, N + 1], as are the next two
        self.spent = torch.zeros_like(self.scale)
        self.rarity = torch.ones_like(self.scale)
        self.rejected = torch.zeros_like(tokens, dtype=torch.bool)

    def token(self, node: Tensor | int) -> tuple[Tensor, Tensor]:
        """What is left of p, and q, at a node's token, where it was drawn: float64 `[S]` each."""
        token = self.tokens[self.row, node].clamp(min=0)
        above = self.parents[self.row, node] + 1
        p, q = self.target[self.row, above, token].double(), self.drafted[self.row, above, token].double()
        left = self.scale[self.row, above] * p - self.spent[self.row, above] * q
        return left.clamp(min=0), q * self.rarity[self.row, above]

    def subtract(self, node: Tensor | int, failed: Tensor, kept: Tensor) -> Tensor:
        """Take q from kept times what is left above `node`, where `failed` `[S]`; the sum that remains, `[S]`."""
        above = self.parents[self.row, node] + 1
        self.rejected[self.row, node] |= failed
        remains = torch.zeros_like(kept)
        rows = rows_worth_visiting(failed)
        if not len(rows):
            return remains
        at, subtracted = above[rows], failed[rows]
        p, q = self.target[rows, at].double(), self.drafted[rows, at].double()  # [r, V], copies
        scale = kept[rows] * self.scale[rows, at]
        spent = kept[rows] * self.spent[rows, at] + self.rarity[rows, at]
        total = p.mul_(scale[:, None]).addcmul_(q, spent[:, None], value=-1).clamp_(min=0).sum(-1)
        remains[rows] = total
        # Where p equals q nothing is left: rejecting was a rounding error, and p stays as it is.
        subtracted = subtracted & (total > 0)
        self.scale[rows, at] = torch.where(subtracted, scale / total, self.scale[rows, at])
        self.spent[rows, at] = torch.where(subtracted, spent / total, self.spent[rows, at])
        if not self.replacement:
            gone = self.rejected[rows] & (self.parents[rows] + 1 == at[:, None])  # [r, N]
            mass = q.scatter_reduce_(1, self.tokens[rows].clamp(min=0), 1.0 - gone.double(), "prod").sum(-1)
            rarity = torch.where(mass > 0, 1 / mass, 0.0)
            self.rarity[rows, at] = torch.where(failed[rows], rarity, self.rarity[rows, at])
        return remains

    def distribution(self, end: Tensor) -> Tensor:
        """What is left at node `end - 1` (0 is the root), float64 `[S, V]`, not normalized."""
        target = self.target[self.row, end].double()
        left = self.scale[self.row, end, None] * target - self.spent[self.row, end, None] * self.drafted[self.row, end]
        left.clamp_(min=0)
        some = left.sum(-1, keepdim=True) > 0  # false also where an unused draft distribution is not a number
        return torch.where(some, left, target)


def _token_probs(probs: Tensor, tokens: Tensor, parents: Tensor) -> Tensor:
    """Probability of each node's token where it was drafted, float64 `[S, N]`; padding counts as token 0."""
    row = torch.arange(len(tokens), device=tokens.device)[:, None]
    return probs[row, parents + 1, tokens.clamp(min=0)].double()


def _elder_siblings(parents: Tensor, valid: Tensor) -> Tensor:
    """Whether node m (last) is an elder sibling of node n: bool `[S, N, N]`."""
    count = parents.shape[1]
    elder = torch.ones(count, count, dtype=torch.bool, device=parents.device).tril(-1)
    return (parents[:, :, None] == parents[:, None, :]) & valid[:, None, :] & elder


def _jumps(parents: Tensor) -> list[Tensor]:
    """Ancestors 1, 2, 4, 8 … levels up, as far as there can be any; int64 `[S, N + 1]`, the root is 0."""
    pointers = [torch.cat([parents.new_zeros(len(parents), 1), parents + 1], dim=1)]
    while 2 ** len(pointers) <= parents.shape[1]:
        pointers.append(pointers[-1].gather(1, pointers[-1]))
    return pointers


def _deepest(parents: Tensor, passed: Tensor) -> Tensor:
    """The deepest node that passed along with all its ancestors: its index plus 1, or 0; `[S]`."""
    whole = torch.cat([passed.new_ones(len(passed), 1), passed], dim=1)
    depth = torch.ones_like(whole, dtype=torch.long)
    depth[:, 0] = 0
    for up in _jumps(parents):
        whole = whole & whole.gather(1, up)
        depth = depth + depth.gather(1, up)
    return torch.where(whole, depth, -1).argmax(-1)


def _verdict(parents: Tensor, end: Tensor, bonus: Tensor) -> Verdict:
    """The path from the root to node `end - 1`."""
    count = parents.shape[1]
    visits = parents.new_zeros(len(parents), count + 1).scatter(1, end[:, None], 1)
    for up in _jumps(parents):
        visits = visits.scatter_add(1, up, visits).clamp(max=1)
    on_path = visits[:, 1:] > 0
    accepted = on_path.sum(1)
    index = torch.arange(count, device=parents.device)
    path = torch.where(on_path, index, count).sort(dim=1).values  # parents come before children
    return Verdict(accepted, torch.where(path < count, path, -1), bonus)


def _walk(parents: Tensor) -> tuple[Tensor, Tensor]:
    """The depth-first walk through each tree, siblings in order: nodes `[S, 2N]`, and whether each is left.

    Every node appears twice, first when the walk comes to it, then when it leaves it for good.
    """
    batch, count = parents.shape
    row = torch.arange(batch, device=parents.device)
    size = torch.ones(batch, count + 1, dtype=torch.long, device=parents.device)
    for node in range(count - 1, -1, -1):
        size[row, parents[:, node] + 1] += size[:, node + 1]
    free = torch.zeros_like(size)  # the next moment at which a child of each node can be entered
    nodes = torch.zeros(batch, 2 * count, dtype=torch.long, device=parents.device)
    leaving = torch.zeros_like(nodes, dtype=torch.bool)
    for node in range(count):
        above = parents[:, node] + 1
        enter = free[row, above]
        leave = enter + 2 * size[:, node + 1] - 1
        free[row, above] = leave + 1
        free[:, node + 1] = enter + 1
        nodes[row, enter] = node
        nodes[row, leave] = node
        leaving[row, leave] = True
    return nodes, leaving
