from .config import Config, DataConfig, FitConfig, InputError, ModelConfig
from .config.families import RefitConfig
from .data.loading import load_data
from .data.splits import DataSpec, Split, Splits
from .diagnostics.columns import check_columns
from .diagnostics.datatree import to_datatree
from .diagnostics.draws import posterior_draws
from .diagnostics.gradients import measure_gradients
from .diagnostics.labels import check_labels, simulate_labels
from .diagnostics.latents import latent_use
from .diagnostics.local import local_test
from .diagnostics.nuts import compare_with_nuts
from .diagnostics.predictive import predictive_check
from .diagnostics.recalibration import recalibrate
from .diagnostics.refinement import gaps, refine
from .diagnostics.sbc import check_ranks, miscalibration, simulate
from .evidence.annealing import anneal
from .evidence.differences import compare_rows
from .evidence.importance import importance_sample, log_evidence, upper_bound
from .evidence.imputation import impute
from .models.autoencoder import Autoencoder
from .models.build import build
from .models.discrete_gaussian import DiscreteGaussian
from .models.labels import ConditionalVAE, SemiSupervisedVAE
from .models.linear_gaussian import LinearGaussian
from .models.pyro_program import Program
from .models.vae import VAE
from .objectives.registry import objective
from .training.checkpoint import load
from .training.loop import fit, iterate
from .training.records import Record
from .training.refitting import refit
from .training.sharing import from_pretrained, push_to_hub

__version__: str

__all__ = [
    "VAE",
    "Autoencoder",
    "ConditionalVAE",
    "Config",
    "DataConfig",
    "DataSpec",
    "DiscreteGaussian",
    "FitConfig",
    "InputError",
    "LinearGaussian",
    "ModelConfig",
    "Program",
    "Record",
    "RefitConfig",
    "SemiSupervisedVAE",
    "Split",
    "Splits",
    "anneal",
    "build",
    "check_columns",
    "check_labels",
    "check_ranks",
    "compare_rows",
    "compare_with_nuts",
    "fit",
    "from_pretrained",
    "gaps",
    "importance_sample",
    "impute",
    "iterate",
    "latent_use",
    "load",
    "load_data",
    "local_test",
    "log_evidence",
    "measure_gradients",
    "miscalibration",
    "objective",
    "posterior_draws",
    "predictive_check",
    "push_to_hub",
    "recalibrate",
    "refine",
    "refit",
    "simulate",
    "simulate_labels",
    "to_datatree",
    "upper_bound",
]
