"""Datasets: COCO JSON read, checked, mended, converted, and turned into what the official trainer trains on."""
