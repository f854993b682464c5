"""Drawing and writing: plots, grids of images, the report and decision pages."""
