"""Networks, their weights, and images, by name.

A network brings its trained weights, its own preparation of pictures and the names of its classes from the
library that it comes from; data is a folder of pictures, a dataset by name, or any iterable of batches.
"""

from snows.sources.data import load_data
from snows.sources.images import Data
from snows.sources.networks import Network, load_model, runs_code
from snows.sources.preparation import Plain, Preparation

__all__ = ["Data", "Network", "Plain", "Preparation", "load_data", "load_model", "runs_code"]
