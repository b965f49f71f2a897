"""What is checked of weights and gradients, on all ranks alike."""

import torch
from torch import nn

from retort.cluster.ranks import world_size
from retort.training.stopping import max_over_ranks


@torch.no_grad()
def require_equal_weights(model: nn.Module) -> None:
    """Raise RuntimeError when the ranks' weights differ. Called by every rank."""
    if world_size() == 1:
        return
    sums = torch.stack([p.detach().double().sum() for p in model.parameters()])
    least, most = sums.clone(), sums.clone()
    torch.distributed.all_reduce(least, torch.distributed.ReduceOp.MIN)
    torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
    if not torch.equal(least, most):
        raise RuntimeError(
            f"{world_size()} ranks hold different weights: their gradients were not shared"
        )


def are_finite(model: nn.Module) -> bool:
    """Return whether all weights, or this rank's shards of them, are finite."""
    weights = [p.to_local() if hasattr(p, "to_local") else p for p in model.parameters()]
    return bool(torch.stack([w.detach().isfinite().all() for w in weights]).all())


def gradient_norm(model: nn.Module) -> float:
    """Return the norm of all gradients, over all shards."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)


def any_rank(is_true: bool, device: torch.device) -> bool:
    """Return whether `is_true` on any rank: if one stopped alone, the others would wait for it forever."""
    return bool(max_over_ranks([is_true], device=device)[0])
