"""Laws of the loss terms: numerics, gradients, schedules, memories. Golden numbers are in test_vectors.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import test_vectors
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from vectors_adapters import ADAPTERS

from kd import losses
from kd.contracts import Batch, Output

CONF = Path(__file__).parent.parent / "conf" / "loss"
FILES = sorted(CONF.glob("*.yaml"))
ON_LOGITS = {
    "kd": losses.SoftTargets,
    "kd_standardised": lambda **o: losses.SoftTargets(standardise=True, **o),
    "kd_per_class": lambda **o: losses.SoftTargets(per_class=True, **o),
    "dkd": losses.DecoupledKD,
    "dkd_standardised": lambda **o: losses.DecoupledKD(standardise=True, **o),
    "nkd": losses.NormalisedKD,
    "ttm": losses.TransformedTeacher,
    "wttm": lambda **o: losses.TransformedTeacher(weighted=True, **o),
    "dist": losses.Correlations,
    "mlkd": lambda temperature=4.0: losses.MultiLevel((temperature, 3.0, 5.0)),
    "mlkd_paper": lambda temperature=4.0: losses.MultiLevel((temperature,), paper_views=True, standardise=True),
    "mse_logits": lambda temperature=None: losses.MSELogits(),
    "cosine": lambda temperature=None: losses.CosineLogits(),
    "pearson": lambda temperature=None: losses.CosineLogits(centred=True),
    "hard": lambda temperature=None: losses.HardTargets(),
    "ce": lambda temperature=None: losses.CrossEntropy(label_smoothing=0.1, views=2),
}
ON_FEATURES = {
    "sp": losses.Similarities,
    "rkd": losses.Distances,
    "cc": lambda: losses.SampleProducts(embed=3),
    "cc_raw": lambda: losses.SampleProducts(embed=None),
    "cckd": losses.Kernels,
    "cckd_unit": lambda: losses.Kernels(unit_length=True, squared=True),
    "cckd_bilinear": lambda: losses.Kernels(kernel="bilinear"),
    "pkt": losses.Probabilities,
    "crd": lambda: losses.ContrastMemory(dim=3, negatives=5),
    "crd_queue": lambda: losses.ContrastQueue(dim=3, size=4),
}


def on_logits(student, teacher) -> tuple[Output, Output]:
    """Outputs of logits; the second view has them upside down, the token's are the same."""
    return tuple(Output(z, second=Output(z.flip(0)), extra_logits=z) for z in (student, teacher))


def on_features(student, teacher) -> tuple[Output, Output]:
    """Outputs of penultimate features, with logits of no meaning."""
    return tuple(Output(x.new_zeros(len(x), 3), features={"penultimate": x}) for x in (student, teacher))


def batch_of(rows: int, classes: int = 3, soft: bool = False, **fields) -> Batch:
    """Targets 0, 1, 2, 0, ...; index 0, 1, 2, ..."""
    targets = torch.arange(rows) % classes
    if soft:
        targets = 0.8 * nn.functional.one_hot(targets, classes).float() + 0.2 / classes
    return Batch(torch.zeros(rows, 1, 1, 1), targets, torch.arange(rows), **fields)


def value(make, pair, batch, num_samples: int = 12, **options):
    """The scalar of a term that was made and set up for the pair; float64 projections where the inputs are."""
    torch.manual_seed(0)
    term = make(**options)
    term.setup(*pair, num_classes=pair[0].logits.shape[1], num_samples=num_samples)
    double = any(x.dtype == torch.float64 for x in (pair[0].logits, *pair[0].features.values()))
    return (term.double() if double else term)(*pair, batch)


# --- numerics ---

EXTREME = {
    "plain": lambda rows: (torch.randn(rows, 7), torch.randn(rows, 7)),
    "wrong": lambda rows: (200 * torch.eye(7)[[1] * rows] - 200, 400 * torch.eye(7)[[0] * rows] - 200),
    "right": lambda rows: (200 * torch.eye(7)[torch.arange(rows) % 7], 200 * torch.eye(7)[torch.arange(rows) % 7]),
    "large": lambda rows: (200 * torch.rand(rows, 7).sign(), -200 * torch.randn(rows, 7).sign()),
    "ties": lambda rows: (torch.ones(rows, 7), torch.ones(rows, 7)),
    "zero": lambda rows: (torch.zeros(rows, 7), torch.randn(rows, 7)),
    "zero_teacher": lambda rows: (torch.randn(rows, 7), torch.zeros(rows, 7)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", EXTREME)
@pytest.mark.parametrize("name", ON_LOGITS)
def test_logit_terms_are_finite_at_all_temperatures(name, kind, dtype):
    for temperature in (0.05, 1.0, 4.0, 20.0):
        for rows in (1, 2, 5):
            torch.manual_seed(rows)
            student, teacher = (z.to(dtype) for z in EXTREME[kind](rows))
            student.requires_grad_()
            loss = value(ON_LOGITS[name], on_logits(student, teacher), batch_of(rows, 7), temperature=temperature)
            (grad,) = torch.autograd.grad(loss, student)
            assert loss.dtype == torch.float32
            assert loss.isfinite()
            assert grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", [*EXTREME, "one_zero_row", "equal_rows", "tiny"])
@pytest.mark.parametrize("name", ON_FEATURES)
def test_relation_terms_are_finite(name, kind, dtype):
    for rows in (1, 2, 5):
        torch.manual_seed(rows)
        student, teacher = EXTREME.get(kind, EXTREME["plain"])(rows)
        if kind == "one_zero_row":
            student[0], teacher[-1] = 0, 0
        if kind == "equal_rows":
            student[:], teacher[:] = student[0], teacher[0]
        if kind == "tiny":
            student = student * 1e-20
        student, teacher = student.to(dtype).requires_grad_(), teacher.to(dtype)
        loss = value(ON_FEATURES[name], on_features(student, teacher), batch_of(rows))
        (grad,) = torch.autograd.grad(loss, student)
        assert loss.isfinite()
        assert grad.isfinite().all()


@pytest.mark.parametrize("name", [*ON_LOGITS, *ON_FEATURES])
def test_autocast_changes_nothing(name):
    pair, make = _pair(name)
    plain = value(make, pair, batch_of(4))
    with torch.autocast("cpu", torch.bfloat16):
        cast = value(make, pair, batch_of(4))
    assert torch.equal(plain, cast)


@pytest.mark.parametrize("name", [*ON_LOGITS, *ON_FEATURES])
def test_soft_labels_are_taken(name):
    pair, make = _pair(name)
    assert value(make, pair, batch_of(4, soft=True)).isfinite()


def _pair(name, rows: int = 4, dtype=torch.float32):
    torch.manual_seed(1)
    tensors = torch.randn(rows, 3, dtype=dtype), torch.randn(rows, 3, dtype=dtype)
    if name in ON_LOGITS:
        return on_logits(*tensors), ON_LOGITS[name]
    return on_features(*tensors), ON_FEATURES[name]


# --- gradients ---


@pytest.mark.parametrize("name", [*ON_LOGITS, *ON_FEATURES])
@settings(max_examples=5, deadline=None, derandomize=True)
@given(rows=st.integers(1, 5), width=st.integers(3, 6), seed=st.integers(0, 99), temperature=st.floats(0.5, 8.0))
def test_gradcheck(name, rows, width, seed, temperature):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(rows, width, dtype=torch.float64, generator=generator) for _ in range(2))
    options = {"temperature": temperature} if name in ON_LOGITS else {}
    make, outputs = (ON_LOGITS | ON_FEATURES)[name], on_logits if name in ON_LOGITS else on_features

    def scalar(x):
        torch.manual_seed(0)
        term = make(**options)
        pair = outputs(x, teacher)
        term.setup(*pair, num_classes=width, num_samples=12)
        if name == "crd":  # Z is a constant of the gradient, so it must not move with x
            term.log_z_s.fill_(1.0), term.log_z_t.fill_(1.0)
        return term.double()(*pair, batch_of(rows, width))

    assert torch.autograd.gradcheck(scalar, student.requires_grad_())


@pytest.mark.parametrize("name", [*ON_LOGITS, *ON_FEATURES])
def test_no_gradient_reaches_the_teacher(name):
    torch.manual_seed(1)
    student, teacher = torch.randn(4, 3, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    pair = on_logits(student, teacher) if name in ON_LOGITS else on_features(student, teacher)
    value((ON_LOGITS | ON_FEATURES)[name], pair, batch_of(4)).backward()
    assert teacher.grad is None
    assert student.grad is not None


def right_cases():
    return [case for case in test_vectors.cases("ok", probes=False) if case.values[1] == "case0"]


@pytest.mark.parametrize(("method", "name", "case"), right_cases())
def test_a_wrong_gradient_is_noticed(method, name, case, monkeypatch):
    """The golden test fails for every method once its gradient is off by one in 10,000, or has the wrong sign."""
    right = ADAPTERS[method].make
    for factor in (1.0001, -1.0):

        def mutated(*args, factor=factor):
            return {k: v.detach() + factor * (v - v.detach()) for k, v in right(*args).items()}

        monkeypatch.setattr(ADAPTERS[method], "make", mutated)
        with pytest.raises(AssertionError):
            test_vectors.test_golden(method, name, case)


MUTATIONS = {
    "kd": ("kd.losses.logits.divergence", lambda s, t: (s.exp() * (s - t)).sum(1)),  # the other way round
    "dkd": ("kd.losses.logits.F.logsigmoid", lambda x: -nn.functional.softplus(-x) * 0.99),
    "dist": ("kd.losses.logits.centre", lambda x: x),  # cosine instead of correlation
    "sp": ("kd.losses.relations.unit", lambda x, **_: x / x.sum(1, keepdim=True)),  # L1 rows
    "pkt": ("kd.losses.relations.unit", lambda x, **_: x),
    "crd": ("kd.losses.contrast.unit", lambda x: x),
}


@pytest.mark.parametrize("method", MUTATIONS)
def test_a_mutated_formula_is_noticed(method, monkeypatch):
    monkeypatch.setattr(*MUTATIONS[method])
    with pytest.raises(AssertionError):
        test_vectors.test_golden(method, "case0", test_vectors.METHODS[method]["cases"]["case0"])


# --- values ---


@pytest.mark.parametrize("name", ["kd", "kd_standardised", "dkd", "mlkd", "mse_logits", "cosine", "pearson", "dist"])
def test_equal_logits_cost_nothing(name):
    z = torch.randn(6, 4, dtype=torch.float64)
    assert value(ON_LOGITS[name], on_logits(z, z), batch_of(6, 4)).abs() < 1e-3  # dist: its eps


@pytest.mark.parametrize("name", ["sp", "rkd", "cc_raw", "cckd", "cckd_bilinear", "pkt"])
def test_equal_features_cost_nothing(name):
    x = torch.randn(6, 4, dtype=torch.float64)
    assert value(ON_FEATURES[name], on_features(x, x), batch_of(6)).abs() < 1e-12


def test_soft_targets_by_hand():
    student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[2.0, 0.0]])
    p = 1 / (1 + torch.tensor(-1.0).exp())  # the teacher's first class at T = 2
    by_hand = 4 * (p * (2 * p).log() + (1 - p) * (2 * (1 - p)).log())
    assert torch.allclose(
        value(losses.SoftTargets, on_logits(student, teacher), batch_of(1, 2), temperature=2.0), by_hand
    )


def test_at_high_temperature_soft_targets_are_regression_of_centred_logits():
    """Hinton et al., sec. 2.1: T² KL -> mean over images of |centred z_s - z_t|² / 2K."""
    student, teacher = torch.randn(5, 4, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    gap = (student - student.mean(1, keepdim=True)) - (teacher - teacher.mean(1, keepdim=True))
    expected = gap.square().sum(1).mean() / 8
    assert torch.allclose(
        value(losses.SoftTargets, on_logits(student, teacher), batch_of(5, 4), temperature=1e4), expected, rtol=1e-3
    )


def test_relations_do_not_see_a_rotation():
    x, t = torch.randn(6, 4, dtype=torch.float64), torch.randn(6, 9, dtype=torch.float64)
    rotation = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))[0]
    for make in (losses.Similarities, losses.Distances, losses.Kernels, losses.Probabilities):
        plain, turned = (value(make, on_features(y, t), batch_of(6)) for y in (x, x @ rotation))
        assert torch.allclose(plain, turned, rtol=1e-9)


def test_distances_do_not_see_shift_or_scale():
    x, t = torch.randn(6, 4), torch.randn(6, 9)
    plain, moved = (value(losses.Distances, on_features(y, t), batch_of(6)) for y in (x, 3 * x + 100))
    assert torch.allclose(plain, moved, rtol=1e-3)


# --- start-up ---


def test_two_classes_are_refused_by_dkd_at_the_start():
    with pytest.raises(ValueError, match="2 classes leave one"):
        value(losses.DecoupledKD, on_logits(torch.zeros(2, 2), torch.zeros(2, 2)), batch_of(2, 2))


def test_unlike_classes_are_refused():
    with pytest.raises(ValueError, match="student has 3 classes, the teacher 4"):
        value(losses.SoftTargets, on_logits(torch.zeros(2, 3), torch.zeros(2, 4)), batch_of(2))


def test_a_token_term_needs_a_token():
    pair = Output(torch.zeros(2, 3)), Output(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="token: false"):
        losses.HardTargets(token=True)(*pair, batch_of(2))
    pair[0].head = nn.Linear(4, 3)  # one plain head: known before the first step
    with pytest.raises(ValueError, match="token: false"):
        losses.HardTargets(token=True).setup(*pair, num_classes=3, num_samples=9)


def test_raw_products_need_one_width():
    with pytest.raises(ValueError, match="set embed: 128"):
        value(lambda: losses.SampleProducts(embed=None), on_features(torch.zeros(2, 3), torch.zeros(2, 4)), batch_of(2))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"kd": {"weight": 1.0}}, "has no _target_"),
        ({"kd": {"_target_": "kd.losses.SoftTarget"}}, "did you mean SoftTargets"),
        ({"kd": {"_target_": "SoftTargets"}}, "no dotted path"),
        ({"kd": {"_target_": "no.such.Thing"}}, "cannot find no.such.Thing"),
        ({"kd": {"_target_": "torch.nn.Linear"}}, "no subclass of kd.losses.Term"),
        ({"kd": {"_target_": "kd.losses.SoftTargets", "temprature": 3}}, "temprature"),
        ({"kd": 3}, "expected _target_"),
        ({}, "no term that counts"),
        ({"kd": {"_target_": "kd.losses.SoftTargets", "first_epochs": 3}}, "no term that counts"),
    ],
)
def test_errors_name_the_term(spec, message):
    with pytest.raises(ValueError, match=message):
        losses.build(spec)


# --- the sum ---


def test_the_sum_adds_weighted_terms_and_names_them():
    spec = yaml.safe_load((CONF / "kd.yaml").read_text())
    total = losses.build(spec)
    pair = on_logits(torch.randn(4, 3), torch.randn(4, 3))
    value, parts = total(*pair, batch_of(4))
    assert torch.allclose(value, 0.1 * parts["ce"] + 0.9 * parts["kd"])
    assert total.describe() == "0.1 ce + 0.9 kd (temperature 4)"


def test_warm_up_and_first_stage():
    ce, kd, ab = losses.CrossEntropy(), losses.SoftTargets(weight=2, warmup_epochs=20), losses.MSELogits(first_epochs=5)
    total = losses.LossSum({"ce": ce, "kd": kd})
    assert total.factors(0.0) == {"ce": 1, "kd": 0}
    assert total.factors(5.0) == {"ce": 1, "kd": 0.5}
    assert total.factors(40.0) == {"ce": 1, "kd": 2}
    staged = losses.LossSum({"ce": ce, "ab": ab})
    assert [staged.factors(epoch) for epoch in (4.9, 5.0)] == [{"ce": 0, "ab": 1}, {"ce": 1, "ab": 0}]
    alone = losses.LossSum({"kd": kd})
    student = torch.randn(4, 3, requires_grad=True)
    alone(*on_logits(student, torch.randn(4, 3)), batch_of(4))[0].backward()  # at the foot of the warm-up
    assert student.grad.abs().max() == 0


def test_terms_keep_float64():
    pair = on_logits(torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64))
    total, _ = losses.build(yaml.safe_load((CONF / "kd.yaml").read_text()))(*pair, batch_of(4))
    assert total.dtype == torch.float64


# --- memories ---


def crd(rows: int = 6, num_samples: int = 40, **options):
    torch.manual_seed(2)
    pair = on_features(torch.randn(rows, 5), torch.randn(rows, 7))
    term = losses.ContrastMemory(dim=4, negatives=64, **options)
    term.setup(*pair, num_classes=3, num_samples=num_samples)
    return term, pair


def test_negatives_are_a_function_of_seed_epoch_and_index():
    term, _ = crd()
    drawn = term.draw(batch_of(6, epoch=3.2, seed=1))
    state = torch.get_rng_state()
    assert torch.equal(drawn, term.draw(batch_of(6, epoch=3.9, seed=1)))
    assert torch.equal(state, torch.get_rng_state())
    one = batch_of(6, epoch=3.2, seed=1)
    one.index, one.targets = one.index[4:5], one.targets[4:5]
    assert torch.equal(drawn[4:5], term.draw(one))  # whatever the batch
    assert not torch.equal(drawn, term.draw(batch_of(6, epoch=4.0, seed=1)))
    assert not torch.equal(drawn, term.draw(batch_of(6, epoch=3.2, seed=2)))
    assert (drawn[:, 0] == torch.arange(6)).all()
    assert (drawn[:, 1:] != torch.arange(6)[:, None]).all()
    assert drawn.unique().numel() == 40


def test_negatives_avoid_the_anchors_class():
    term, _ = crd(num_samples=600)
    term.classes = torch.arange(600) % 3
    drawn = term.draw(batch_of(6))[:, 1:]
    same = (term.classes[drawn] == torch.arange(6)[:, None] % 3).float().mean()
    assert same < 0.08  # 1/27 after three draws; 1/3 without


def test_memory_is_a_buffer_changed_by_training_alone():
    term, pair = crd()
    first = {key: tensor.clone() for key, tensor in term.state_dict().items()}
    assert {"memory_s", "memory_t", "classes", "log_z_s", "log_z_t", "embed_s.weight"} <= set(first)
    term.eval()(*pair, batch_of(6))
    assert torch.equal(first["memory_s"], term.memory_s)
    assert term.log_z_s.isnan()
    term.train()(*pair, batch_of(6))
    assert not torch.equal(first["memory_s"][:6], term.memory_s[:6])
    assert torch.equal(first["memory_s"][6:], term.memory_s[6:])
    assert torch.allclose(term.memory_s[:6].norm(dim=1), torch.ones(6))
    other, _ = crd()
    other.load_state_dict(term.state_dict())
    assert torch.equal(term(*pair, batch_of(6)), other(*pair, batch_of(6)))


def test_both_ways_to_the_scores_agree():
    term, _ = crd(num_samples=400)
    anchors, rows = torch.randn(6, 4), term.draw(batch_of(6))
    large = term._scores(anchors, term.memory_t, rows[:, :9])  # 400 rows > 9 * 4: by gathering rows
    assert torch.allclose(term._scores(anchors, term.memory_t, rows)[:, :9], large, atol=1e-6)


def test_the_memory_starts_without_a_generator():
    state = torch.get_rng_state()
    start = losses.contrast.noise(500, 12, 1)
    assert torch.equal(state, torch.get_rng_state())
    assert abs(start.mean()) < 0.02
    assert abs(start.square().sum(1).mean() - 1) < 0.05
    assert not torch.equal(start, losses.contrast.noise(500, 12, 2))


def test_the_queue_holds_the_last_images():
    term = losses.ContrastQueue(dim=3, size=4)
    pair = on_features(torch.randn(3, 5), torch.randn(3, 5))
    term.setup(*pair, num_classes=3, num_samples=9)
    for _ in range(3):
        term.train()(*pair, batch_of(3))
    assert term.next == 9 % 4
    assert term.classes.tolist() == [2, 0, 1, 2] or sorted(term.classes.tolist()) == [0, 1, 2, 2]
    assert torch.allclose(term.queue_t.norm(dim=1), torch.ones(4))
    longer = on_features(torch.randn(7, 5), torch.randn(7, 5))
    assert term(*longer, batch_of(7)).isfinite()  # a batch longer than the queue
    assert losses.ContrastQueue(dim=3, size=0).embed_s is not None


# --- the literature's CIFAR-100 table ---

PUBLISHED = {
    "kd": {"ce.weight": 0.1, "kd.weight": 0.9, "kd.temperature": 4},
    "dkd": {"dkd.target_weight": 1, "dkd.nontarget_weight": 8, "dkd.temperature": 4, "dkd.warmup_epochs": 20},
    "fitnet": {"fitnet.weight": 100},
    "at": {"at.weight": 1000},
    "rkd": {"rkd.weight": 1, "rkd.distance_weight": 25, "rkd.angle_weight": 50},
    "crd": {"crd.weight": 0.8, "crd.negatives": 16384, "crd.temperature": 0.07, "crd.momentum": 0.5, "crd.dim": 128},
    "reviewkd": {"reviewkd.weight": 5, "reviewkd.warmup_epochs": 20},
    "sp": {"sp.weight": 3000},
    "pkt": {"pkt.weight": 30000},
    "nst": {"nst.weight": 50},
    "vid": {"vid.weight": 1},
    "cc": {"cc.weight": 0.02},
    "dist": {"dist.inter_weight": 2, "dist.intra_weight": 2, "dist.weight": 1, "dist.temperature": 4},
    "ft": {"ft.weight": 200},
}


@pytest.mark.parametrize("method", PUBLISHED)
def test_the_cifar100_recipe_has_the_published_weights(method):
    pytest.importorskip("hydra")
    from kd import compose

    cfg = compose("+experiment=crd_cifar100", f"loss=[{method}]")
    total = losses.build(cfg.loss)
    assert {key: getattr(total.terms[key.split(".")[0]], key.split(".")[1]) for key in PUBLISHED[method]} == PUBLISHED[
        method
    ]
    assert total.terms["ce"].weight == (0.1 if method == "kd" else 1)
    for recipe in (cfg.recipe, cfg.teacher.recipe):
        assert (recipe.epochs, recipe.batch_size, recipe.optimizer, recipe.lr) == (240, 64, "sgd", 0.05)
        assert (recipe.weight_decay, recipe.milestones, recipe.decay) == (5e-4, [150, 180, 210], 0.1)
    assert (cfg.augment.crop_padding, cfg.augment.flip) == (4 / 32, True)
    assert (cfg.dataset.name, cfg.dataset.val_fraction) == ("cifar100", 0)


# --- every file of conf/loss on toy networks ---


class Toy(nn.Module):
    """Four stages as maps (CNN) or tokens (ViT-like), a head, and logits of a distillation token."""

    def __init__(self, width: int, tokens: bool = False, classes: int = 5):
        super().__init__()
        strides = (1, 1, 1, 1) if tokens else (1, 2, 1, 2)
        widths = (1, width, width, width, width) if tokens else (1, width, width, 2 * width, 2 * width)
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv2d(i, o, 3, s, 1), nn.BatchNorm2d(o), nn.ReLU())
            for i, o, s in zip(widths[:-1], widths[1:], strides, strict=True)
        )
        self.head, self.token_head, self.tokens = nn.Linear(widths[-1], classes), nn.Linear(widths[-1], classes), tokens

    def forward(self, images) -> Output:
        features = {}
        for number, stage in enumerate(self.stages, 1):
            images = stage(images)
            features[f"stage{number}"] = images.flatten(2).transpose(1, 2) if self.tokens else images
        features["penultimate"] = images.mean((2, 3))
        vector = features["penultimate"]
        return Output(self.head(vector), features, self.head, extra_logits=self.token_head(vector))


def toy_pair(kind: str) -> tuple[Toy, Toy]:
    torch.manual_seed(0)
    student, teacher = kind.split("_from_")
    return Toy(4, student == "vit"), Toy(6, teacher == "vit").eval().requires_grad_(False)


def toy_outputs(student: Toy, teacher: Toy, images) -> tuple[Output, Output]:
    pair = student(images), teacher(images)
    pair[0].second, pair[1].second = student(images.flip(3)), teacher(images.flip(3))
    return pair


def one_hot(targets, classes):
    """F.one_hot as on CUDA, where it does not check the range of the targets, so does not wait."""
    return torch.zeros(len(targets), classes, dtype=torch.int64).scatter(1, targets[:, None], 1)


class NoWaiting(TorchDispatchMode):
    """Fails on what would make the host wait for a device: item(), bool(), nonzero()."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function)
        if any(word in name for word in ("_local_scalar_dense", "nonzero", "masked_select", "unique")):
            raise AssertionError(f"{name} waits for the device")
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["cnn_from_cnn", "cnn_from_vit", "vit_from_cnn"])
@pytest.mark.parametrize("file", FILES, ids=[file.stem for file in FILES])
def test_every_loss_falls_on_toy_networks(file, kind, monkeypatch):
    monkeypatch.setattr(nn.functional, "one_hot", one_hot)
    student, teacher = toy_pair(kind)
    images = torch.rand(10, 1, 8, 8)
    batch = batch_of(10, 5, epoch=0.5)
    total = losses.build(yaml.safe_load(file.read_text()))
    student.eval()
    try:
        total.setup(*toy_outputs(student, teacher, images[:2]), num_classes=5, num_samples=20)
    except ValueError as error:
        assert len(str(error)) > 40  # says why
        pytest.skip(str(error))
    student.train(), total.train()
    optimizer = torch.optim.SGD([*student.parameters(), *total.parameters()], lr=2e-3, momentum=0.5)
    values = []
    for _ in range(15):
        with NoWaiting():
            value, _ = total(*toy_outputs(student, teacher, images), batch)
        assert value.isfinite()
        values.append(value.item())
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_([*student.parameters(), *total.parameters()], 5.0)
        optimizer.step()
    assert min(values[-5:]) < values[1]


def test_a_misspelt_argument_is_named_with_the_nearest():
    with pytest.raises(ValueError, match=r"no temprature\. Did you mean temperature"):
        losses.build({"kd": {"_target_": "kd.losses.SoftTargets", "temprature": 3}})
    with pytest.raises(ValueError, match="temperature=0: expected a number above 0"):
        losses.build({"kd": {"_target_": "kd.losses.SoftTargets", "temperature": 0}})
