"""Which tokens go to which expert, and which experts the next layer may want."""

from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True, slots=True)
class RoutedTokens:
    """The tokens that are routed to one expert."""

    expert: int
    # [n] rows of the hidden states; None if there is only one token.
    tokens: torch.Tensor | None
    # [n] index among the experts of its token.
    places: torch.Tensor | int

    def take(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [tokens, hidden] -> [n, hidden]."""
        return hidden if self.tokens is None else hidden[self.tokens]

    def weigh(self, y: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        """y [n, hidden], top_k_weights [tokens, k] -> [n, hidden]."""
        if self.tokens is None:
            return y * top_k_weights[0, self.places, None]
        return y * top_k_weights[self.tokens, self.places, None]

    def add(self, y: torch.Tensor, output: torch.Tensor) -> None:
        """Add y [n, hidden] to the rows of its tokens."""
        if self.tokens is None:
            output.add_(y)
        else:
            output.index_add_(0, self.tokens, y)


def group(top_k_index: torch.Tensor, num_experts: int) -> list[RoutedTokens]:
    """top_k_index [tokens, k] -> its experts in the order of their numbers, their tokens in the
    order of (place, token).
    """
    tokens = len(top_k_index)
    # The usual case: an operation saved here is saved for every expert of every layer.
    if tokens == 1:
        place_of = {expert: place for place, expert in enumerate(top_k_index[0].tolist())}
        return [
            RoutedTokens(expert, None, place_of[expert])
            for expert in sorted(place_of)
            if expert < num_experts
        ]
    flat = top_k_index.t().reshape(-1)
    order = torch.sort(flat, stable=True).indices
    counts = torch.bincount(flat, minlength=num_experts)[:num_experts].tolist()
    of_token, places = order % tokens, order // tokens
    groups, start = [], 0
    for expert, count in enumerate(counts):
        if count:
            groups.append(
                RoutedTokens(expert, of_token[start : start + count], places[start : start + count])
            )
            start += count
    return groups


def routed_next(router: nn.Module, place: int, first: int, hidden: torch.Tensor) -> list[int]:
    """The experts that `router` of the next layer would choose for hidden states [tokens, hidden]
    of this one, most likely first; numbered from `first`. Their norms differ, so it is a guess.
    """
    # Past its hooks: they note what is routed.
    index: torch.Tensor = type(router).forward(router, hidden)[place]
    return [first + expert for expert in dict.fromkeys(index.t().reshape(-1).tolist())]
