import gc

import torch
import transformers  # noqa: F401


# The models are tiny: a second thread costs more than it brings.
torch.set_num_threads(1)
# `Trainer.train` collects garbage, most of the time of a tiny training; what is imported by now is none.
gc.collect()
gc.freeze()
