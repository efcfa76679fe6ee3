"""DerProp training on any folder in VOC layout; `python -m examples.derprop_voc --help`."""
