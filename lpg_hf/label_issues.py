"""Which training labels are wrong: what one training run makes of each of its rows, ranked."""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from datasets import ClassLabel, Dataset, Features, Value
from torch import Tensor, nn


# Below it a relative confidence says no more: one visit must not outweigh all others.
SMALLEST_CONFIDENCE = 1e-4
# What waits to be added up at most: micro-batches, and logits in all of them.
MAX_WAITING_BATCHES = 32
MAX_WAITING_LOGITS = 2**20


class RowRecords(nn.Module):
    r"""
    What a training run makes of each row of its data set: sums over the visits, kept on the device.

    The score of a row is one minus the geometric mean, over its visits, of `p_y / max_j p_j`: how far the model
    believed the label just before it learned from it, 1 where no class was more likely. A network believes right
    labels before it memorises wrong ones, so the whole run tells them apart where its end no longer does; a method
    that keeps the model from memorising widens the gap. The suggested label is the other class that the visits vote
    for, each with the probability it gave to it.

    Source: the mean over epochs is the confidence of Swayamdipta et al., Dataset cartography (EMNLP 2020), the vote
    in one counter per row that of Boyer and Moore (1981), with the merging of Misra and Gries (1982) over processes;
    the ratio, the geometric mean, the weights and taking both from a training that is perturbed are ours.

    Args:
        num_rows (`int`): Rows of the data set, n.

    Example:

    ```python
    >>> import torch
    >>> records = RowRecords(num_rows=3)
    >>> logits = torch.tensor([[2.0, 0.0], [0.0, 2.0]])
    >>> records.update(torch.tensor([2, 0]), logits, labels=torch.tensor([1, 1]))
    >>> issues = records.ranked(["cat", "dog"])  # row 1 has not been visited
    >>> issues["row"][:], [round(score, 4) for score in issues["score"]]
    ([2, 0], [0.8647, 0.0])

    ```
    """

    _sums: Tensor
    _labels: Tensor
    _votes: Tensor

    def __init__(self, num_rows: int):
        super().__init__()
        # The last column of each is for samples whose row is not known.
        # Visits, log of the relative confidence, weight under class-relative dampening (1 without it).
        self.register_buffer("_sums", torch.zeros(3, num_rows + 1))
        # The label, -1 before the first visit, and the class that leads the vote with the votes below.
        self.register_buffer("_labels", torch.full((2, num_rows + 1), -1, dtype=torch.int64))
        self.register_buffer("_votes", torch.zeros(num_rows + 1))

    @property
    def num_rows(self) -> int:
        return len(self._votes) - 1

    @staticmethod
    def num_rows_of(state: Mapping[str, Tensor]) -> int:
        """Rows of the data set that a `state_dict` was written for."""
        return len(state["_votes"]) - 1

    @property
    def has_visits(self) -> bool:
        return bool(self._sums[0].any())

    @property
    def largest_label(self) -> int:
        """Of the labels seen and suggested."""
        return int(self._labels.max())

    @property
    def num_unknown(self) -> int:
        """Samples whose row is not known."""
        return int(self._sums[0, -1])

    @torch.no_grad()
    def update(self, rows: Tensor, logits: Tensor, labels: Tensor, weight: Tensor | None = None) -> None:
        """
        Adds the visits of a micro-batch. Of a row that occurs more than once in it only the last vote counts.

        Args:
            rows (`torch.Tensor` of shape `[N]`): Row of each sample, `num_rows` where it is not known.
            logits (`torch.Tensor` of shape `[N, C]`): The model's own, float32 or float64.
            labels (`torch.Tensor` of shape `[N]`): Class indices; others, as -100, for ignored samples.
            weight (`torch.Tensor` of shape `[N]`, *optional*): Weight of each sample under class-relative dampening.
        """
        # A loss of the user's may ignore other labels than -100.
        classes = labels.clamp(0, logits.shape[-1] - 1)
        labelled = classes == labels
        log_probabilities = logits.log_softmax(-1)
        own = log_probabilities.gather(-1, classes[:, None])[:, 0]
        largest, others = log_probabilities.scatter_(-1, classes[:, None], -torch.inf).max(-1)
        confidence = (own - largest).clamp(max=0)
        # `where` and not `clamp`, which would keep a NaN for good.
        floor = math.log(SMALLEST_CONFIDENCE)
        confidence = torch.where(confidence > floor, confidence, floor)
        visit = labelled.to(own.dtype)
        # Above 1 it is compensation, which is not the sample's own.
        values = torch.stack([visit, confidence, visit if weight is None else weight.clamp(max=1)])
        self._sums.index_add_(1, rows, torch.where(labelled, values, 0.0).to(self._sums.dtype))

        vote = torch.where(labelled & largest.isfinite(), largest.exp(), 0.0).to(self._votes.dtype)
        label, leader = self._labels[:, rows]
        leader, votes = _merge_votes(leader, self._votes[rows], others, vote)
        self._labels[:, rows] = torch.stack([torch.where(labelled, labels, label), leader])
        self._votes[rows] = votes

    def merged(self, gather: Callable[[Tensor], Tensor]) -> "RowRecords":
        """
        The records of all processes in one, on the CPU.

        Args:
            gather (`Callable`): Stacks a tensor of every process along a new leading axis.
        """
        sums, labels, votes = gather(self._sums).cpu(), gather(self._labels).cpu(), gather(self._votes).cpu()
        whole = RowRecords(self.num_rows)
        whole._sums = sums.sum(0)
        leader, counts = labels[0, 1], votes[0]
        for other_leader, other_counts in zip(labels[1:, 1], votes[1:], strict=True):
            leader, counts = _merge_votes(leader, counts, other_leader, other_counts)
        whole._labels = torch.stack([labels[:, 0].amax(0), leader])
        whole._votes = counts
        return whole

    def ranked(self, names: Sequence[str], with_weight: bool = False) -> Dataset:
        """
        The rows that were visited, those first whose label is most likely wrong; see [`LPGTrainer.label_issues`].

        Args:
            names (`Sequence[str]`): Of the classes.
            with_weight (`bool`, *optional*, defaults to `False`): Whether there was class-relative dampening.
        """
        visits, log_confidence, weight = self._sums[:, :-1].double().cpu()
        score = 1 - (log_confidence / visits).exp()
        rows = score.nan_to_num(nan=-1).sort(descending=True, stable=True).indices
        rows = rows[visits[rows] > 0]
        labels = self._labels[:, rows].cpu()
        columns = {"row": rows, "label": labels[0], "suggested_label": labels[1], "score": score[rows]}
        if with_weight:
            columns["weight"] = weight[rows] / visits[rows]
        columns["visits"] = visits[rows].long()
        types = {"label": ClassLabel(names=list(names)), "suggested_label": ClassLabel(names=list(names))}
        features = {
            name: types.get(name, Value("float64" if column.is_floating_point() else "int64"))
            for name, column in columns.items()
        }
        return Dataset.from_dict(
            {name: column.numpy() for name, column in columns.items()}, features=Features(features)
        )


class VisitQueue:
    """
    Adds up the visits of many micro-batches at once: operations that small ask for time by their number alone.

    Whoever reads the records calls `flush` first. A row should be visited once between two flushes, as only its last
    vote counts: [`LPGTrainer`] flushes after each epoch.

    Args:
        records ([`RowRecords`]): Where the visits go.
    """

    def __init__(self, records: RowRecords):
        self.records = records
        self._waiting: list[tuple[Tensor, Tensor, Tensor, Tensor | None]] = []
        self._num_logits = 0

    def add(self, rows: Tensor, logits: Tensor, labels: Tensor, weight: Tensor | None = None) -> None:
        """
        Takes what [`RowRecords.update`] takes, the logits in any precision, labels `[N, 1]` and rows on the host, too.
        Nobody else may change the tensors any more.
        """
        if self._waiting and (weight is None) != (self._waiting[-1][-1] is None):
            self.flush()
        self._waiting.append((rows, logits, labels, weight))
        self._num_logits += logits.numel()
        if len(self._waiting) == MAX_WAITING_BATCHES or self._num_logits >= MAX_WAITING_LOGITS:
            self.flush()

    def flush(self) -> None:
        if self._waiting:
            rows, logits, labels, weights = zip(*self._waiting, strict=True)
            logits = torch.cat(logits)
            self.records.update(
                torch.cat(rows).to(logits.device),
                logits.to(torch.promote_types(logits.dtype, torch.float32)),
                torch.cat(labels).reshape(-1).long(),
                None if weights[0] is None else torch.cat(weights),
            )
            self._waiting, self._num_logits = [], 0


def _merge_votes(leader: Tensor, votes: Tensor, other: Tensor, other_votes: Tensor) -> tuple[Tensor, Tensor]:
    """Two counts of a majority vote in one: equal leaders add up, of different ones the larger keeps the rest."""
    sum = votes + torch.where(leader == other, other_votes, -other_votes)
    # In a tie the other leads, where there is one.
    return torch.where((sum > 0) | (other < 0), leader, other), sum.abs()
