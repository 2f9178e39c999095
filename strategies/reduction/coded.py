"""The canonical reduction with sums that are rounded on their way.

What is rounded must not depend on how many ranks there are, or who has what. So it is the sums at fixed nodes of the
tree that are: a leaf's as soon as it is computed, an inner node's as soon as its children are added up, by whoever does
that. All that crosses the wire are codes of such sums, and the sum of all is one of them. What a node has rounded off
it adds to the same sum in the next step, where the format asks for that: that is state of the node
(`strategies.reduction.residuals`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch

from strategies.comm.groups import Groups
from strategies.layout.parallel import ParallelLayout
from strategies.reduction.reducer import Reducer, RoundReducer
from strategies.reduction.residuals import rounded_nodes
from strategies.reduction.tree import Subtree, split
from strategies.reduction.tree_sum import Summing, TreeSum
from strategies.wire.blocks import Blocks, from_message, to_message
from strategies.wire.codecs import WORD, Codec, codec_of
from strategies.wire.format import WireFormat


class Residual(NamedTuple):
    """What a node has rounded off before, and where that of this step is put; whether it `is_put` there already."""

    now: torch.Tensor
    next: torch.Tensor
    is_put: bool = True


class Rounding(Summing):
    """Rounds sums of one buffer, cut into `blocks`. `residual_of` gives what there is of a node, of the same buffer."""

    def __init__(self, wire: WireFormat, blocks: Blocks, residual_of: Callable[[Subtree], Residual]) -> None:
        self.wire = wire
        self.blocks = blocks
        self.codec: Codec = codec_of(wire)
        self._residual_of = residual_of

    def codec_at(self, node: Subtree) -> Codec | None:
        """None where sums are sent as they are."""
        return self.codec if self.wire.rounds(node) else None

    def start(self, root: Subtree, pool: list[torch.Tensor]) -> TreeSum:
        return CodedSum(root, pool, self)

    def go_on(self, sums: TreeSum) -> bool:
        """What its nodes have rounded off in this step must still be here: the rank may have given it away meanwhile,
        and got it back as it was before."""
        assert isinstance(sums, CodedSum)
        sums.rounding = self
        if not self.wire.feedback:
            return True
        made = [node for piece in sums.pieces for node in rounded_nodes(piece, self.wire)]
        return all(self._residual_of(node).is_put for node in made)

    def round(self, node: Subtree, values: torch.Tensor) -> torch.Tensor | None:
        if not self.wire.rounds(node):
            return None
        found = self.blocks.take(values)
        residual = self._residual_of(node) if self.wire.feedback else None
        if residual is not None:
            found = found + self.blocks.take(residual.now)
        codes = self.codec.encode(found)
        rounded = self.codec.decode(codes)
        if residual is not None:
            self.blocks.put(found - rounded, residual.next)
        self.blocks.put(rounded, values)
        return codes


class CodedSum(TreeSum):
    """A sum along the tree that is rounded at its nodes."""

    def __init__(self, root: Subtree, pool: list[torch.Tensor], rounding: Rounding) -> None:
        super().__init__(root, pool)
        self.rounding = rounding

    def add(self, node: Subtree, tensor: torch.Tensor) -> None:
        super().add(node, self._made(node, tensor))

    def add_arrived(self, node: Subtree, tensor: torch.Tensor, codes: torch.Tensor | None) -> None:
        """Adds a sum that another has rounded."""
        if codes is not None:
            self.codes[node] = codes
        super().add(node, tensor)

    def _made(self, node: Subtree, tensor: torch.Tensor) -> torch.Tensor:
        if node[1] - node[0] > 1:
            for child in split(node):
                self.codes.pop(child, None)
        if (codes := self.rounding.round(node, tensor)) is not None:
            self.codes[node] = codes
        return tensor


class CodedReducer(Reducer):
    """A `Reducer` of coded sums. `own` rounds this rank's slice; `blocks` are those of the whole buffer."""

    def __init__(
        self, groups: Groups, layout: ParallelLayout, blocks: Blocks, device: torch.device, slices: Sequence[int],
        own: Rounding,
    ) -> None:  # fmt: skip
        super().__init__(groups, layout, blocks.length, device, slices=slices)
        self._blocks = blocks
        self._own = own
        self._ranges = list(pairwise([0, *accumulate(self.slices)]))
        self._of_rank = [blocks.cut(start, stop) for start, stop in self._ranges]
        self._total_codes: torch.Tensor | None = None

    def reduce(
        self, pieces: Mapping[Subtree, torch.Tensor], codes: Mapping[Subtree, torch.Tensor] | None = None
    ) -> torch.Tensor:  # fmt: skip
        codes = codes or {}
        self.check_pieces(pieces)
        rank, root = self.groups.rank, self.layout.root
        mine = self.covers[rank]
        if self.layout.data == 1:
            self._total_codes = codes.get(root)
            return pieces[mine[0]]
        outgoing = [
            part
            for peer in range(self.layout.data)
            for node in mine
            for part in self._message(peer, pieces[node], codes.get(node))
        ]
        words = [[blocks.num_words(self._own.codec_at(node)) for node in mine] for blocks in self._of_rank]
        sizes = [[self._of_rank[rank].num_words(self._own.codec_at(node)) for node in nodes] for nodes in self.covers]
        received = torch.empty(sum(map(sum, sizes)), dtype=torch.int32, device=self._device)
        sent = torch.cat(outgoing) if outgoing else received[:0]
        self.groups.all_to_all(received, sent, [sum(each) for each in sizes], [sum(each) for each in words])
        self._tell_plain(sum(1 for node in mine if self._own.wire.rounds(node)))
        sums = CodedSum(root, [], self._own)
        nodes = [node for each in self.covers for node in each]
        for node, message in zip(nodes, received.split([s for each in sizes for s in each]), strict=True):
            values = torch.empty(self.slices[rank], device=self._device)
            found = from_message(self._of_rank[rank], self._own.codec_at(node), message, values)
            sums.add_arrived(node, values, found)
        self._total_codes = sums.codes.get(root)
        return sums.total()

    def _tell_plain(self, num_nodes: int) -> None:
        """Of the messages about this many nodes that are coded, what is not was sent as it is."""
        others = [blocks for rank, blocks in enumerate(self._of_rank) if rank != self.groups.rank]
        self.groups.traffic.relabel("plain", WORD * num_nodes * sum(blocks.num_plain for blocks in others))

    def _message(self, peer: int, values: torch.Tensor, codes: torch.Tensor | None) -> list[torch.Tensor]:
        """What a rank is sent of a node: its slice."""
        start, stop = self._ranges[peer]
        if codes is not None:
            first, last = self._blocks.numbers(start, stop)
            codes = codes[first:last]
        return to_message(self._of_rank[peer], codes, values[start:stop])

    def gather_sum(self, mine: torch.Tensor, everything: torch.Tensor) -> None:
        ranks = self.layout.data
        if ranks == 1:
            everything.copy_(mine)
            return
        # The sum of all is rounded like that of any node, so that its codes are all that there is to be sent.
        codec = self._own.codec_at(self.layout.root)
        message = torch.cat(to_message(self._of_rank[self.groups.rank], self._total_codes, mine))
        sizes = [blocks.num_words(codec) for blocks in self._of_rank]
        received = torch.empty(sum(sizes), dtype=torch.int32, device=self._device)
        self.groups.all_to_all(received, message.repeat(ranks), sizes, [len(message)] * ranks)
        if codec is not None:
            own = self._of_rank[self.groups.rank].num_plain
            self.groups.traffic.relabel("plain", WORD * own * (ranks - 1))
        for blocks, (start, stop), part in zip(self._of_rank, self._ranges, received.split(sizes), strict=True):
            from_message(blocks, codec, part, everything[start:stop])


class CodedRoundReducer(RoundReducer):
    """A `RoundReducer` of coded sums. `own` rounds this rank's slice."""

    def __init__(
        self, groups: Groups, layout: ParallelLayout, blocks: Blocks, sizes: Sequence[int], device: torch.device,
        own: Rounding,
    ) -> None:  # fmt: skip
        super().__init__(groups, layout, sizes, device)
        self._blocks = blocks
        self._own = own
        self._ranges = list(pairwise([0, *accumulate(self.sizes)]))
        self._of_rank = [blocks.cut(start, stop) for start, stop in self._ranges]
        self._sums = CodedSum(layout.root, self._pool, own)

    def add(self, number: int, gradient: torch.Tensor, codes: torch.Tensor | None = None) -> None:
        rank = self.groups.rank
        leaf = (0, 1)
        codec = self._own.codec_at(leaf)
        brings = [number < len(held) for held in self.layout.assignment]
        words = [blocks.num_words(codec) for blocks in self._of_rank]
        outgoing: list[torch.Tensor] = []
        if brings[rank]:
            for (start, stop), blocks in zip(self._ranges, self._of_rank, strict=True):
                first, last = self._blocks.numbers(start, stop)
                outgoing += to_message(blocks, None if codes is None else codes[first:last], gradient[start:stop])
        sizes = [words[rank] if each else 0 for each in brings]
        received = torch.empty(sum(sizes), dtype=torch.int32, device=self._device)
        sent = torch.cat(outgoing) if outgoing else received[:0]
        self.groups.all_to_all(received, sent, sizes, words if brings[rank] else [0] * len(words))
        if brings[rank] and codec is not None:
            plain = sum(blocks.num_plain for blocks in self._of_rank) - self._of_rank[rank].num_plain
            self.groups.traffic.relabel("plain", WORD * plain)
        found = []
        for held, message in zip(self.layout.assignment, received.split(sizes), strict=True):
            if number < len(held):
                values = torch.empty(self.sizes[rank], device=self._device)
                from_message(self._of_rank[rank], codec, message, values)
                found.append(((held[number], held[number] + 1), values))
        self._sums.add_round(found)
