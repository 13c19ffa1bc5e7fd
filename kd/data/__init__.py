"""Images in, batches out: data sets, their splits, and the augmented view, all drawn from counters.

Importing this costs torch alone; torchvision, Pillow and scikit-learn are imported where an image is decoded.
"""

from kd.data.dataset import Dataset, load
from kd.data.source import Items, Source
from kd.data.split import Split
from kd.data.view import View

__all__ = ["Dataset", "Items", "Source", "Split", "View", "load"]
