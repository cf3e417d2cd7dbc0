"""Run by torchrun in test_ray_training.py: the training stage of a run whose rows are mined, in each process.

``train_share.py OUTPUT``
"""

from __future__ import annotations

import sys

import torch

from st_clp.run.folder import RunDirectory
from st_clp.run.modelling import load_base_model
from st_clp.run.splits import load_collections
from st_clp.run.training_stage import TrainingStage
from st_clp.settings import RunSettings

torch.set_num_threads(1)
directory = RunDirectory(sys.argv[1])
settings = RunSettings.from_dict(directory.started_settings())
model = load_base_model(settings.model, max_seq_length=settings.max_seq_length)
TrainingStage(settings, directory, load_collections(settings).train, say=print).run(model)
