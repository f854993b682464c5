"""Feature spaces for distances between sets of images: each is a class in a file of its own, imported here."""

from ldm.evaluation.features.pca import Pca as Pca
