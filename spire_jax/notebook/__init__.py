"""What `launch/colab.ipynb` shows: who reads what, training as it goes, decoded text, costs.

Needs a notebook's packages (IPython; ipywidgets for `cost_widgets`) besides requirements.txt.
"""

from spire_jax.notebook.attention import layers_figure, masks_figure, reads_figure
from spire_jax.notebook.costs import cost_figure, cost_widgets, winners_figure
from spire_jax.notebook.curves import live_curves, train
from spire_jax.notebook.decoding import coloured, decode
from spire_jax.notebook.parts import image

__all__ = [
    "coloured", "cost_figure", "cost_widgets", "decode", "image", "layers_figure", "live_curves",
    "masks_figure", "reads_figure", "train", "winners_figure",
]  # fmt: skip
