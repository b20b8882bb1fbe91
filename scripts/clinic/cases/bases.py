"""Healthy twins by name: override lines of short sound runs, most of them seconds on one core."""

from __future__ import annotations

_RUN = ("recipe=none", "trainer=cpu", "progress=false", "threads=1", "seed=0")
_ADAM = ("optimizer=adam", "optimizer.lr=0.003")
_MOMENTUM = ("optimizer=momentum", "scheduler=cosine")
_DIGITS = ("data=digits", "data.val_share=0.25", "scaling=standardize", "trainer.max_epochs=15")
_FASHION = ("data=fashion_mnist", "data.limit=1200", "scaling=standardize", "trainer.max_epochs=10")
_SYNTHETIC = ("data=synthetic", "data.images=1200", "data.image_size=12", "data.noise=120", "scaling=standardize",
              "trainer.max_epochs=10")  # fmt: skip
_FEW = ("data=synthetic", "data.images=1200", "data.image_size=8", "data.classes=4", "data.noise=130",
        "data.channels=3", "scaling=unit", "trainer.max_epochs=12")  # fmt: skip


def _import(name: str) -> tuple[str, str]:
    return "model=import", f"model.path=scripts.clinic.cases.nets:{name}"


_MLP = ("model=mlp", "model.widths=[96,64]")
_CNN = ("model=cnn", "model.widths=[12,24]")
_DEEP = ("model=mlp", "model.widths=[48,48,48,48,48,48,48,48]")
_RESNET = ("model=resnet", "model.depth=20", "model.width=0.5", "norm=batch")
_INCEPTION = ("model=inception", "model.width=0.25", "norm=batch")
_SGD = ("optimizer=sgd",)

_HARD = ("data=synthetic", "data.images=600", "data.image_size=12", "data.noise=320", "scaling=standardize",
         "data.val_share=0.4", "trainer.max_epochs=20")  # fmt: skip
_JUMPY = ("optimizer=momentum", "optimizer.lr=0.1", "data.batch_size=8", "scheduler=cosine", "trainer.max_epochs=4")
_SLOW = ("optimizer=momentum", "optimizer.lr=0.003", "trainer.max_epochs=12", "data.batch_size=32")
_SWING = ("optimizer=momentum", "optimizer.lr=0.05", "trainer.max_epochs=12")
_TWO = (
    "data.batch_size=2",
    "norm=group",
    "data.limit=400",
    "trainer.max_epochs=2",
    "optimizer=adam",
    "optimizer.lr=0.002",
)
_SCARCE = ("data.limit=100", "data.batch_size=20", "trainer.max_epochs=40")
_LONG = ("data.limit=200", "data.batch_size=20", "trainer.max_epochs=8")
_NOISY = ("data.noise=150",)
_SMALL = ("model=mlp", "model.widths=[24]")

_PARTS = {
    "mlp": (_DIGITS, _MLP, _ADAM),
    "mlp_sgd": (_DIGITS, _MLP, _SGD),
    "mlp_momentum": (_DIGITS, _MLP, _MOMENTUM),
    "mlp_adamw": (_DIGITS, _MLP, ("optimizer=adamw", "scheduler=cosine")),
    "mlp_bn": (_DIGITS, _MLP, ("norm=batch",), _MOMENTUM),
    "mlp_unit": (_DIGITS, ("scaling=unit",), _MLP, _ADAM),
    "deep_mlp": (_DIGITS, _DEEP, ("init=he_normal",), _ADAM),
    "deep_mlp_bn": (_DIGITS, _DEEP, ("norm=batch", "init=he_normal"), _MOMENTUM),
    "deep_tanh": (_DIGITS, _DEEP, ("activation=tanh", "init=glorot_normal"), _ADAM),
    "tanh_mlp": (_DIGITS, _MLP, ("activation=tanh", "init=glorot_normal"), _ADAM),
    "cnn": (_DIGITS, _CNN, _ADAM),
    "cnn_sgd": (_DIGITS, _CNN, _SGD),
    "cnn_bn": (_DIGITS, _CNN, ("norm=batch", "init=he_normal"), _MOMENTUM),
    "cnn_adamw": (_DIGITS, _CNN, ("norm=batch", "optimizer=adamw", "scheduler=cosine")),
    "cnn_muon": (_DIGITS, _CNN, ("norm=batch", "optimizer=muon", "scheduler=cosine")),
    "resnet": (_DIGITS, _RESNET, _MOMENTUM, ("trainer.max_epochs=8",)),
    "inception": (_DIGITS, _INCEPTION, _ADAM, ("trainer.max_epochs=8",)),
    "fashion_mlp": (_FASHION, _MLP, _ADAM),
    "fashion_sgd": (_FASHION, _MLP, _SGD, ("optimizer.lr=0.05",)),
    "fashion_cnn": (_FASHION, _CNN, ("norm=batch", "model.widths=[8,16]"), _MOMENTUM),
    "fashion_plain": (_FASHION, _CNN, _ADAM, ("model.widths=[8,16]",)),
    "synthetic_mlp": (_SYNTHETIC, _MLP, _ADAM),
    "synthetic_sgd": (_SYNTHETIC, _MLP, _SGD),
    "synthetic_cnn": (_SYNTHETIC, _CNN, ("norm=batch",), _MOMENTUM),
    "few_mlp": (_FEW, _MLP, _ADAM),
    "few_cnn": (_FEW, _CNN, ("norm=batch",), _MOMENTUM),
    "sequential": (_DIGITS, _import("mlp"), _ADAM),
    "sequential_sgd": (_DIGITS, _import("mlp"), _SGD),
    "sequential_momentum": (_FASHION, _import("mlp"), _MOMENTUM),
    "sequential_tanh": (_DIGITS, _import("mlp_tanh"), _ADAM),
    "sequential_norm": (_DIGITS, _import("mlp_norm"), _ADAM),
    "deep_sequential": (_DIGITS, _import("deep_relu"), ("init=he_normal",), _ADAM),
    "deep_norm": (_DIGITS, _import("deep_norm"), _MOMENTUM),
    "vgg": (_DIGITS, _import("vgg"), _MOMENTUM),
    "vgg_plain": (_DIGITS, _import("vgg_plain"), _ADAM, ("init=he_normal",)),
    "vgg_few": (_FEW, _import("vgg"), _ADAM),
    "pooled": (_DIGITS, _import("pooled"), _ADAM),
    "pooled_few": (_FEW, _import("pooled"), _MOMENTUM),
    "waist": (_DIGITS, _import("waist"), _ADAM),
    "waist_synthetic": (_SYNTHETIC, _import("waist"), _MOMENTUM),
    "lenet": (_DIGITS, _import("lenet"), _ADAM),
    "lenet_few": (_FEW, _import("lenet"), _ADAM),
    "lenet_momentum": (_DIGITS, _import("lenet"), _MOMENTUM, ("optimizer.lr=0.2",)),
    "functional": (_DIGITS, _import("Functional"), _ADAM),
    "functional_sgd": (_DIGITS, _import("Functional"), _SGD),
    "functional_few": (_FEW, _import("Functional"), _ADAM),
    "residual_mlp": (_DIGITS, _import("ResidualMlp"), _ADAM),
    "vit": (_DIGITS, _import("Vit"), _ADAM),
    "shufflenet": (
        ("data=synthetic", "data.images=640", "data.image_size=32", "data.channels=3", "data.classes=4"),
        ("data.noise=60", "data.batch_size=32", "scaling=standardize", "trainer.max_epochs=5"),
        ("model=torchvision", "model.name=shufflenet_v2_x0_5"), _ADAM,
    ),
    "deep_sgd": (_DIGITS, _DEEP, ("init=he_normal",), _SGD, ("optimizer.lr=0.05",)),
    "deep_wide": (_DIGITS, ("model=mlp", "model.widths=[256,256,256,256]", "init=he_normal"), _ADAM,
                  ("optimizer.lr=0.001",)),
    "hard_mlp": (_HARD, _MLP, _ADAM),
    "hard_sequential": (_HARD, _import("mlp"), _MOMENTUM),
    "two_mlp": (_DIGITS, _MLP, _TWO),
    "two_deep": (_DIGITS, ("model=mlp", "model.widths=[64,64,64,64]"), _TWO),
    "two_momentum": (_DIGITS, _MLP, _TWO, ("optimizer=momentum", "optimizer.lr=0.005")),
    "three_mlp": (_DIGITS, _MLP, _TWO, ("data.batch_size=3", "data.limit=600")),
    "two_fashion": (_FASHION, _MLP, _TWO, ("data.limit=800", "trainer.max_epochs=1")),
    "two_few": (_FEW, _MLP, _TWO),
    "two_sequential": (_DIGITS, _import("mlp_norm"), _TWO),
    "two_resnet": (_DIGITS, ("model=resnet", "model.depth=20", "model.width=0.25"), _TWO),
    "swing_mlp": (_DIGITS, _MLP, _SWING),
    "swing_cnn": (_DIGITS, _CNN, _SWING, ("norm=batch",)),
    "swing_sequential": (_FASHION, _import("mlp"), _SWING),
    "swing_few": (_FEW, _MLP, _SWING),
    "swing_vgg": (_DIGITS, _import("vgg"), _SWING),
    "swing_nesterov": (_SYNTHETIC, _MLP, _SWING, ("optimizer=nesterov",)),
    "scarce_mlp": (_SYNTHETIC, _NOISY, _SMALL, _ADAM, _SCARCE),
    "scarce_fashion": (_FASHION, _SMALL, _ADAM, _SCARCE),
    "scarce_digits": (_DIGITS, _SMALL, _ADAM, _SCARCE),
    "scarce_few": (_FEW, _SMALL, _ADAM, _SCARCE),
    "scarce_sequential": (_FASHION, _import("mlp_small"), _ADAM, _SCARCE),
    "jumpy_mlp": (_DIGITS, _MLP, _JUMPY, ("optimizer.lr=0.03",)),
    "jumpy_cnn": (_DIGITS, _CNN, ("norm=batch",), _JUMPY, ("trainer.max_epochs=3",)),
    "jumpy_fashion": (_FASHION, _MLP, _JUMPY, ("optimizer.lr=0.02", "trainer.max_epochs=3")),
    "jumpy_sequential": (_FASHION, _import("mlp"), _JUMPY, ("trainer.max_epochs=3", "optimizer.lr=0.015")),
    "jumpy_few": (_FEW, _MLP, _JUMPY, ("optimizer.lr=0.045",)),
    "jumpy_sgd": (_SYNTHETIC, _MLP, _JUMPY, ("optimizer=sgd", "optimizer.lr=0.25")),
    "slow_mlp": (_DIGITS, _MLP, _SLOW),
    "slow_sequential": (_DIGITS, _import("mlp"), _SLOW),
    "slow_fashion": (_FASHION, _MLP, _SLOW, ("optimizer.lr=0.0015",)),
    "slow_cnn": (_DIGITS, _CNN, _SLOW, ("optimizer.lr=0.002",)),
    "slow_functional": (_DIGITS, _import("Functional"), _SLOW, ("optimizer.lr=0.002",)),
    "long_deep": (_FASHION, ("model=mlp", "model.widths=[256,256,256]"), _ADAM, _LONG),
    "long_fashion": (_FASHION, _MLP, _ADAM, _LONG),
    "long_cnn": (_SYNTHETIC, _NOISY, _CNN, _ADAM, _LONG),
    "long_sequential": (_FASHION, _import("mlp"), _ADAM, _LONG),
    "long_few": (_HARD, _CNN, _ADAM, _LONG, ("data.noise=200",)),
    "long_functional": (_HARD, _import("Functional"), _ADAM, _LONG, ("data.noise=220",)),
}  # fmt: skip

BASES: dict[str, tuple[str, ...]] = {name: sum((_RUN, *parts), ()) for name, parts in _PARTS.items()}
