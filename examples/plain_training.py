"""Train RetinaNet in plain PyTorch with fusedet's parts, no trainer: python plain_training.py DATA [EPOCHS]."""

import sys

import torch

from fusedet import read_dataset
from fusedet.api.detector_evaluation import detect
from fusedet.data.loader import build_eval_loader, build_train_loader
from fusedet.data.transforms import EvalTransform, TrainTransform
from fusedet.evaluation.coco_metrics import evaluate_coco
from fusedet.models.backbones import TimmBackbone
from fusedet.models.detectors.neck_chain import NeckChain
from fusedet.models.detectors.one_stage import OneStage
from fusedet.models.heads.retina import RetinaHead
from fusedet.models.necks import FPN, SMSL

SHORT, LONG, BATCH = 256, 256, 8
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def build_detector(num_classes, backbone="resnet18"):
    features = TimmBackbone(backbone, pretrained=False)
    fpn = FPN(features.levels, channels=64)
    neck = NeckChain([fpn, SMSL(fpn.levels)])
    head = RetinaHead(neck.levels, num_classes, convs=2, norm=True, base_scale=2.0)
    return OneStage(features, neck, head, {"score": 0.05, "iou": 0.5, "max_det": 100}).to(device)


def train(detector, dataset, epochs, lr=0.02):
    loader = build_train_loader(dataset, TrainTransform([SHORT], LONG), batch=BATCH)
    optimizer = torch.optim.SGD(detector.parameters(), lr, momentum=0.9, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, epochs * len(loader), pct_start=0.1)
    detector.train()
    for epoch in range(epochs):
        for batch in loader.epoch(epoch):
            losses = detector.loss(batch.to(device))
            total = sum(detector.loss_weights[name] * value for name, value in losses.items())
            optimizer.zero_grad()
            total.backward()
            torch.nn.utils.clip_grad_norm_(detector.parameters(), 35)
            optimizer.step()
            schedule.step()
        print(f"epoch {epoch + 1}: loss {total.item():.3f}")


def evaluate(detector, dataset):
    batches = build_eval_loader(dataset, EvalTransform(SHORT, LONG), batch=BATCH)
    return evaluate_coco(dataset, detect(detector.eval(), batches, dataset, device))


if __name__ == "__main__":
    data, val = (read_dataset(sys.argv[1], split) for split in ("train", "val"))
    model = build_detector(len(data.names))
    train(model, data, epochs=int(sys.argv[2]) if len(sys.argv) > 2 else 12)
    print(f"AP {evaluate(model, val)['AP']:.3f}")
