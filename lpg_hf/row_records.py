"""What one training run records of each of its rows, from which rows with wrong labels are ranked."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import pyarrow as pa
import torch
from datasets import ClassLabel, Dataset, DatasetInfo, Features, Value
from torch import Tensor, nn

from .row_numbers import NUM_MARKS, REORDERED, UNKNOWN, UNVERIFIED


# Smaller ratios of confidence count as this one, so that one visit cannot outweigh all others.
SMALLEST_CONFIDENCE = 1e-4
# As many rows are gathered from all processes at once.
MERGED_ROWS = 2**20
# Largest number of micro-batches, and of logits in all of them, that wait to be added up.
MAX_WAITING_BATCHES = 32
MAX_WAITING_LOGITS = 2**20


class Visits(NamedTuple):
    """
    What the visits of some samples say of their rows, without the logits.

    Attributes:
        numbers (`torch.Tensor` of shape `[3, N]`): As int64: row, label, and the most likely class other than it.
        values (`torch.Tensor` of shape `[4, N]`):
            As float32: 1 (0 for ignored samples), log of the confidence ratio, weight, and vote for the other class.
    """

    numbers: Tensor
    values: Tensor


@torch.no_grad()
def look_at(rows: Tensor, logits: Tensor, labels: Tensor, weight: Tensor | None = None) -> Visits:
    """
    Sums up a micro-batch on its device, without a wait for it.

    Args:
        rows, logits, labels and weight: As for [`TrainingDynamics.update`].
    """
    # A custom loss may ignore other labels than -100.
    classes = labels.clamp(0, logits.shape[-1] - 1)
    valid_mask = classes == labels
    log_probabilities = logits.log_softmax(-1)
    label_log_prob = log_probabilities.gather(-1, classes[:, None])[:, 0]
    largest, others = log_probabilities.scatter_(-1, classes[:, None], -torch.inf).max(-1)
    log_ratio = (label_log_prob - largest).clamp(max=0)
    # `clamp` would keep a NaN for good.
    floor = math.log(SMALLEST_CONFIDENCE)
    log_ratio = torch.where(log_ratio > floor, log_ratio, floor)
    visit = valid_mask.to(label_log_prob.dtype)
    vote = torch.where(largest.isfinite(), largest.exp(), 0.0)
    # A weight above 1 compensates for other samples and says nothing about this one.
    values = torch.stack([visit, log_ratio, visit if weight is None else weight.clamp(max=1), vote])
    return Visits(torch.stack([rows, classes, others]), torch.where(valid_mask, values, 0.0).float())


class TrainingDynamics(nn.Module):
    r"""
    Sums over the visits of each row of a data set during one training run, kept on the host: 24 bytes per row.

    The score of a row is one minus the geometric mean of `p_y / max_j p_j` over its visits. The ratio says how far the
    model believed the label just before it learned from it; it is 1 if no class was more likely. A network believes
    right labels before it memorizes wrong ones. The whole run therefore tells them apart when the end of the run no
    longer does. A method that slows memorization widens the gap. The suggested label is the class other than the label
    that wins a vote over the visits, in which each visit votes with the probability of its favorite.

    Source: The mean over epochs is the confidence of Swayamdipta et al., Dataset cartography (EMNLP 2020). The vote
    with one counter per row is by Boyer and Moore (1981), and its merging over processes by Misra and Gries (1982).
    The ratio, the geometric mean, the weights, and taking both from a perturbed training are ours.

    Args:
        num_rows (`int`): Number of rows of the data set, n.

    Example:

    ```python
    >>> import torch
    >>> records = TrainingDynamics(num_rows=3)
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
        # The last columns of each buffer are for samples whose row is unknown, and count those that are unverified.
        size = num_rows + NUM_MARKS
        # Visits, log of the confidence ratio, weight under class-relative dampening (1 without it).
        self.register_buffer("_sums", torch.zeros(3, size))
        # The label (-1 before the first visit), and the class that leads the vote with the votes below.
        self.register_buffer("_labels", torch.full((2, size), -1, dtype=torch.int32))
        self.register_buffer("_votes", torch.zeros(size))

    @property
    def num_rows(self) -> int:
        """Number of rows of the data set."""
        return len(self._votes) - NUM_MARKS

    @staticmethod
    def num_rows_of(state: Mapping[str, Tensor]) -> int:
        """Number of rows of the data set that a `state_dict` was written for."""
        return len(state["_votes"]) - NUM_MARKS

    @property
    def has_visits(self) -> bool:
        """Whether any sample was recorded."""
        return bool(self._sums[0].any())

    @property
    def has_unverified(self) -> bool:
        """Whether a sample was recorded whose row is known only if the collator keeps the order of its items."""
        return bool(self._sums[0, self.num_rows + UNVERIFIED] > 0)

    @property
    def largest_label(self) -> int:
        """The largest of the labels seen and suggested."""
        return int(self._labels.max())

    def labels_of_visited(self) -> dict[int, int]:
        """The label of each row that was visited."""
        rows = self._sums[0, : self.num_rows].nonzero()[:, 0]
        return dict(zip(rows.tolist(), self._labels[0, rows].tolist(), strict=True))

    @property
    def num_samples(self) -> tuple[int, int, int]:
        """Number of samples whose row is known, of those whose row is not, and of those in another order than rows."""
        visits = self._sums[0].double()
        known, n = int(visits[: self.num_rows].sum()), self.num_rows
        return known, int(visits[n + UNKNOWN]), int(visits[n + REORDERED])

    def forget(self, rows: Tensor) -> None:
        """
        Drops the records of some rows.

        Args:
            rows (`torch.Tensor` of shape `[num_rows]`): Whether to drop the record of a row.
        """
        rows = torch.cat([rows, rows.new_zeros(NUM_MARKS)])
        self._sums[:, rows], self._labels[:, rows], self._votes[rows] = 0, -1, 0

    def relabeled(self, labels: Tensor) -> Tensor:
        """
        Finds the rows whose label is not the recorded one.

        Args:
            labels (`torch.Tensor` of shape `[num_rows]`): The label of each row.

        Returns:
            `torch.Tensor` of shape `[num_rows]`: Whether a row was visited with another label.
        """
        recorded = self._labels[0, : self.num_rows]
        return (recorded >= 0) & (recorded != labels)

    @torch.no_grad()
    def update(self, rows: Tensor, logits: Tensor, labels: Tensor, weight: Tensor | None = None) -> None:
        """
        Adds the visits of a micro-batch. If a row occurs more than once in it, only its last vote counts.

        The record of a row belongs to one label: with another label it starts anew, and its former visits count as
        unknown.

        Args:
            rows (`torch.Tensor` of shape `[N]`): Row of each sample; `num_rows` if it is unknown, `num_rows + 1` if
                the batch was reordered, and `-1 - row` if nothing has verified the row.
            logits (`torch.Tensor` of shape `[N, C]`): Logits of the model, float32 or float64.
            labels (`torch.Tensor` of shape `[N]`): Class indices. Other values, such as -100, mark ignored samples.
            weight (`torch.Tensor` of shape `[N]`, *optional*): Weight of each sample under class-relative dampening.
        """
        self.add(look_at(rows, logits, labels, weight))

    @torch.no_grad()
    def add(self, visits: Visits) -> None:
        """
        Adds what [`look_at`] has seen of a micro-batch.

        Args:
            visits ([`Visits`]): The visits, on the host.
        """
        rows, labels, others = visits.numbers
        vote, valid_mask = visits.values[3], visits.values[0] > 0
        self._sums[0, self.num_rows + UNVERIFIED] += ((rows < 0) & valid_mask).sum()
        rows = torch.where(rows < 0, -1 - rows, rows)  # as `mark_unverified` does
        label, leader = self._labels[:, rows]
        is_relabeled = valid_mask & (label >= 0) & (label != labels) & (rows < self.num_rows)
        former = self._sums[:, rows]
        self._sums[:, rows] = former.masked_fill(is_relabeled, 0.0)
        self._sums[0, self.num_rows + UNKNOWN] += (former[0] * is_relabeled).sum()
        self._sums.index_add_(1, rows, visits.values[:3])
        leader, votes = leader.masked_fill(is_relabeled, -1), self._votes[rows].masked_fill(is_relabeled, 0.0)
        leader, votes = _merge_votes(leader, votes, others, vote)
        self._labels[:, rows] = torch.stack([torch.where(valid_mask, labels, label), leader]).int()
        self._votes[rows] = votes

    def merged(self, gather: Callable[[Tensor], Tensor]) -> "TrainingDynamics":
        """
        Merges the records of all processes.

        Args:
            gather (`Callable`): Stacks a tensor of every process along a new leading axis.

        Returns:
            [`TrainingDynamics`]: The merged records.
        """
        merged = TrainingDynamics(self.num_rows)
        for start in range(0, len(self._votes), MERGED_ROWS):
            part = slice(start, start + MERGED_ROWS)
            sums, labels, votes = (
                gather(buffer[..., part]).cpu() for buffer in (self._sums, self._labels, self._votes)
            )
            merged._sums[:, part] = sums.sum(0)
            leader, counts = labels[0, 1], votes[0]
            for other_leader, other_counts in zip(labels[1:, 1], votes[1:], strict=True):
                leader, counts = _merge_votes(leader, counts, other_leader, other_counts)
            merged._labels[:, part] = torch.stack([labels[:, 0].amax(0), leader])
            merged._votes[part] = counts
        return merged

    def ranked(self, names: Sequence[str], with_weight: bool = False) -> Dataset:
        """
        Ranks the rows that were visited, beginning with the labels that are most likely wrong.

        Args:
            names (`Sequence[str]`): Names of the classes.
            with_weight (`bool`, *optional*, defaults to `False`):
                Whether to add the mean weight under class-relative dampening.

        Returns:
            `datasets.Dataset`: The table described at [`LPGTrainer.label_issues`].
        """
        visits, log_confidence, weight = self._sums[:, : self.num_rows].double()
        score = 1 - (log_confidence / visits).exp()
        rows = score.nan_to_num(nan=-1).sort(descending=True, stable=True).indices
        rows = rows[visits[rows] > 0]
        labels = self._labels[:, rows].long()
        columns = {"row": rows, "label": labels[0], "suggested_label": labels[1], "score": score[rows]}
        if with_weight:
            columns["weight"] = weight[rows] / visits[rows]
        columns["visits"] = visits[rows].long()
        types = {"label": ClassLabel(names=list(names)), "suggested_label": ClassLabel(names=list(names))}
        features = {
            name: types.get(name, Value("float64" if column.is_floating_point() else "int64"))
            for name, column in columns.items()
        }
        # `Dataset.from_dict` looks at each value, which takes seconds for a million rows.
        table = pa.table({name: column.numpy() for name, column in columns.items()})
        return Dataset(table, info=DatasetInfo(features=Features(features)))


class DynamicsBuffer:
    """
    Collects the visits of many micro-batches, sums them up at once, and sends the sums to the host.

    On tensors this small, the number of operations decides how long they take. A GPU is never waited for: what it
    sends is added when the next sums follow. Call `flush` before reading the records. Each row should be visited at
    most once between two flushes, because only its last vote counts. [`LPGTrainer`] flushes after each epoch.

    Args:
        records ([`TrainingDynamics`]): Receives the visits.
    """

    def __init__(self, records: TrainingDynamics):
        self.records = records
        self._waiting: list[tuple[Tensor, Tensor, Tensor, Tensor | None]] = []
        self._num_logits = 0
        # On their way to the host, with the event of their arrival.
        self._sent: list[tuple[Visits, torch.cuda.Event | None]] = []

    def add(self, rows: Tensor, logits: Tensor, labels: Tensor, weight: Tensor | None = None) -> None:
        """
        Adds the visits of a micro-batch.

        It takes the arguments of [`TrainingDynamics.update`]. The logits may have any precision, the labels may have
        the shape `[N, 1]`, and the rows may be on the host. The tensors must not be changed afterwards.
        """
        if self._waiting and (weight is None) != (self._waiting[-1][-1] is None):
            self._send()
        self._waiting.append((rows, logits, labels, weight))
        self._num_logits += logits.numel()
        if len(self._waiting) == MAX_WAITING_BATCHES or self._num_logits >= MAX_WAITING_LOGITS:
            self._send()

    def flush(self) -> None:
        """Adds all visits that wait to the records."""
        self._send()
        self._receive()

    def _send(self) -> None:
        if self._waiting:
            all_rows, all_logits, all_labels, weights = zip(*self._waiting, strict=True)
            logits = torch.cat(all_logits)
            visits = look_at(
                torch.cat(all_rows).to(logits.device),
                logits.to(torch.promote_types(logits.dtype, torch.float32)),
                torch.cat(all_labels).reshape(-1).long(),
                None if weights[0] is None else torch.cat(weights),
            )
            self._waiting, self._num_logits = [], 0
            self._receive()
            self._sent.append(_to_host(visits))
            if self._sent[-1][1] is None:
                self._receive()

    def _receive(self) -> None:
        for visits, event in self._sent:
            if event is not None:
                event.synchronize()
            self.records.add(visits)
        self._sent = []


def _to_host(visits: Visits) -> tuple[Visits, torch.cuda.Event | None]:
    device = visits.values.device
    if device.type != "cuda":
        return Visits(*(tensor.cpu() for tensor in visits)), None
    # Only a copy into pinned memory leaves the host free.
    copies = [torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True) for tensor in visits]
    for copy, tensor in zip(copies, visits, strict=True):
        copy.copy_(tensor, non_blocking=True)
    return Visits(*copies), torch.cuda.current_stream(device).record_event()


def _merge_votes(leader: Tensor, votes: Tensor, other: Tensor, other_votes: Tensor) -> tuple[Tensor, Tensor]:
    """Merges two counts of a majority vote: equal leaders add up, of different ones the larger keeps the rest."""
    total = votes + torch.where(leader == other, other_votes, -other_votes)
    # In a tie the other class leads, if there is one.
    return torch.where((total > 0) | (other < 0), leader, other), total.abs()
