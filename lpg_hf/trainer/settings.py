"""What the user asked for, in the arguments of LPGTrainer and in its config."""

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import TrainingArguments

from ..config import LPGConfig
from ..perturbations import LogitPerturbation, Perturbation, build_chain
from ..share_texts import EVAL_DATASET, EvalShares, plain_shares, read_eval_shares


@dataclass(frozen=True)
class Settings:
    """
    The arguments of LPGTrainer that the Trainer does not have. Where one was left out, the config counts.

    Attributes:
        perturbations (`str`, [`Perturbation`] or a sequence of them, *optional*): The chain.
        class_counts (`Sequence[int]`, *optional*): Number of training samples of each class.
        eval_shares (`str`, `Sequence[float]` or `Mapping`, *optional*): The class shares of the evaluation.
    """

    perturbations: str | Perturbation | Sequence[str | Perturbation] | None
    class_counts: Sequence[int] | None
    eval_shares: EvalShares | None

    def chain(self, args: TrainingArguments | None) -> Sequence[str | Perturbation]:
        """The chain, under the arguments of a training."""
        given = self.perturbations
        given = [given] if isinstance(given, str | Perturbation) else given
        if isinstance(args, LPGConfig):
            return args.chain(given)
        return ["auto"] if given is None else given

    def shares(self, args: TrainingArguments) -> EvalShares:
        """The class shares of the evaluation, as [`find_eval_shares`] takes them."""
        shares = self.eval_shares
        if shares is None:
            shares = args.eval_shares if isinstance(args, LPGConfig) else EVAL_DATASET
        plain = plain_shares(shares)
        return read_eval_shares(plain) if isinstance(plain, str) else plain


def is_requested_at_logits(entry: str | Perturbation) -> bool:
    """Whether an entry of a chain names a method at the logits, which `auto` does not."""
    return entry != "auto" and any(isinstance(method, LogitPerturbation) for method in build_chain([entry]))
