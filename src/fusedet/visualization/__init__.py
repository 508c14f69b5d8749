"""Images with boxes and masks, and plots of evaluations and training runs."""

from fusedet.visualization.colors import class_color
from fusedet.visualization.evaluation_plots import (
    plot_ap_by_size,
    plot_confusion_matrix,
    plot_differences,
    plot_precision_recall,
)
from fusedet.visualization.images import draw_boxes, draw_comparison, draw_image_grid, save_image
from fusedet.visualization.latency_plot import plot_latency
from fusedet.visualization.training_curves import plot_training

__all__ = [
    "class_color",
    "draw_boxes",
    "draw_comparison",
    "draw_image_grid",
    "plot_ap_by_size",
    "plot_confusion_matrix",
    "plot_differences",
    "plot_latency",
    "plot_precision_recall",
    "plot_training",
    "save_image",
]
