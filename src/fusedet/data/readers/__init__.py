"""Dataset readers: COCO, VOC and YOLO, and the detection of the format."""
