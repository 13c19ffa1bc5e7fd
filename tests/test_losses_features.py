"""Laws of the terms on features: layouts, zeros, hand-computed values, gradients, pairs of unlike architectures."""

import copy
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from kd.contracts import Batch, Output
from kd.graft import GraftedHead, Norm
from kd.losses import (
    ActivationBoundary,
    AttentionTransfer,
    FactorTransfer,
    FitNet,
    Flow,
    LossSum,
    NeuronSelectivity,
    OneForAll,
    Overhaul,
    ReviewKD,
    SimKD,
    SoftmaxRegression,
    Term,
    Variational,
)
from kd.losses.align import grid, pool_larger, to_map, to_tokens, to_vector
from kd.losses.attention import attention_map
from kd.losses.boundary import normal_margin
from kd.losses.heads import linear_head
from kd.losses.ofa import adapted_soft_targets
from kd.losses.reviewkd import hierarchical_distance

CLASSES = 5
TERMS = {
    "fitnet": FitNet,
    "fitnet_linear": lambda **k: FitNet(regressor="linear", **k),
    "at": AttentionTransfer,
    "at_paper": lambda **k: AttentionTransfer(form="paper", **k),
    "vid": Variational,
    "ab": ActivationBoundary,
    "ft": FactorTransfer,
    "nst": NeuronSelectivity,
    "ofd": Overhaul,
    "reviewkd": ReviewKD,
    "simkd": SimKD,
    "srrl": SoftmaxRegression,
    "fsp": Flow,
    "ofa": OneForAll,
}


class TinyCNN(nn.Module):
    """Four shrinking maps 8, 4, 2, 2 of 8x8 images; the head is on the mean of the last."""

    def __init__(self, width=4):
        super().__init__()
        widths = (3, width, width, 2 * width, 2 * width)
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, 3, stride, 1), nn.BatchNorm2d(b), nn.ReLU())
            for a, b, stride in zip(widths, widths[1:], (1, 2, 2, 1), strict=False)
        )
        self.head = nn.Linear(2 * width, CLASSES)

    def forward(self, images):
        features, x = {}, images
        for n, stage in enumerate(self.stages):
            features[f"stage{n + 1}"] = x = stage(x)
        features["penultimate"] = x.mean((2, 3))
        return Output(self.head(features["penultimate"]), features, self.head)


class TinyViT(nn.Module):
    """Four stages of 1 + 16 tokens; the head is on the normalised class token."""

    def __init__(self, width=12):
        super().__init__()
        self.patch, self.first = nn.Conv2d(3, width, 2, 2), nn.Parameter(torch.randn(1, 1, width))
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(width, 2, 16, 0.0, batch_first=True) for _ in range(4))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, CLASSES)

    def forward(self, images):
        x = self.patch(images).flatten(2).transpose(1, 2)
        x, features = torch.cat([self.first.expand(len(x), -1, -1), x], dim=1), {}
        for n, block in enumerate(self.blocks):
            features[f"stage{n + 1}"] = x = block(x)
        features["penultimate"] = self.norm(x)[:, 0]
        return Output(self.head(features["penultimate"]), features, self.head)


class TinyMLP(nn.Module):
    """Four vectors of one image; every stage is (B, D)."""

    def __init__(self, width=10):
        super().__init__()
        widths = (192, width, width, width, width)
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))
        self.head = nn.Linear(width, CLASSES)

    def forward(self, images):
        features, x = {}, images.flatten(1)
        for n, layer in enumerate(self.layers):
            features[f"stage{n + 1}"] = x = torch.relu(layer(x))
        features["penultimate"] = x
        return Output(self.head(x), features, self.head)


PAIRS = {
    "cnn->cnn": (lambda: TinyCNN(8), TinyCNN),
    "vit->cnn": (TinyViT, TinyCNN),
    "cnn->vit": (lambda: TinyCNN(8), TinyViT),
    "mlp->cnn": (TinyMLP, TinyCNN),
    "vit->mlp": (TinyViT, TinyMLP),
}
NEED_POSITIONS = ("fsp", "at", "at_paper", "nst", "ft")


def some_batch(rows=6, soft=False, epoch=5.0):
    images, targets = torch.rand(rows, 3, 8, 8), torch.arange(rows) % CLASSES
    targets = nn.functional.one_hot(targets, CLASSES) * 0.9 + 0.02 if soft else targets
    return Batch(images, targets, torch.arange(rows), epoch=epoch)


def prepared(name, pair, **options):
    """(term, student, teacher) after a dry forward in evaluation mode."""
    torch.manual_seed(0)
    teacher, student = (make() for make in PAIRS[pair])
    teacher.eval().requires_grad_(False)
    images = some_batch().images
    term = TERMS[name](**options)
    term.setup(student.eval()(images), teacher(images), CLASSES, 100)
    return term.train(), student.train(), teacher


# layouts


@pytest.mark.parametrize(
    ("tokens", "expected"), [(16, (4, 0)), (17, (4, 1)), (18, (4, 2)), (1, (1, 0)), (201, (14, 5))]
)
def test_token_grids(tokens, expected):
    assert grid(tokens) == expected


def test_tokens_that_are_no_square_are_refused():
    with pytest.raises(ValueError, match="no square grid"):
        to_map(torch.zeros(2, 22 * 11, 3))


def test_layouts_go_round():
    x = torch.randn(2, 3, 4, 4)
    prefixed = torch.cat([torch.full((2, 1, 3), 9.0), to_tokens(x)], dim=1)
    assert torch.equal(to_map(to_tokens(x)), x)
    assert torch.equal(to_map(prefixed), x)  # the class token is no place
    torch.testing.assert_close(to_vector(prefixed), x.mean((2, 3)))
    vector = torch.randn(2, 5)
    assert to_map(vector).shape == (2, 5, 1, 1)
    assert to_tokens(vector).shape == (2, 1, 5)
    assert torch.equal(to_vector(vector), vector)


def test_the_larger_map_is_pooled():
    small, large = torch.randn(1, 2, 2, 2), torch.randn(1, 3, 4, 4)
    assert [x.shape[-1] for x in pool_larger(small, large)] == [2, 2]
    assert [x.shape[-1] for x in pool_larger(large, small)] == [2, 2]
    torch.testing.assert_close(pool_larger(large, small)[0], nn.functional.avg_pool2d(large, 2))


def test_batch_norm_takes_one_value_per_channel():
    assert Norm(3).train()(torch.randn(1, 3, 1, 1)).isfinite().all()


def test_a_missing_feature_is_named():
    output = Output(torch.zeros(2, 3), {"stage1": torch.zeros(2, 3, 4, 4)})
    with pytest.raises(ValueError, match=r"student's feature 'stage2'.*\['stage1'\]"):
        AttentionTransfer().setup(output, output, 3, 8)


# values


@pytest.mark.parametrize("name", ["at", "at_paper", "nst", "fsp"])
def test_zero_when_the_maps_are_equal(name):
    maps = {f"stage{n}": torch.randn(3, 4, 6 - n, 6 - n).double() for n in (1, 2, 3, 4)}
    student = Output(torch.zeros(3, 2), {k: v.clone().requires_grad_() for k, v in maps.items()})
    term = TERMS[name]()
    term.setup(student, Output(torch.zeros(3, 2), maps), 2, 8)
    loss = term(student, Output(torch.zeros(3, 2), maps), some_batch(3))
    loss.backward()
    assert abs(loss.item()) < 1e-15
    assert all(v.grad is None or v.grad.abs().max() < 1e-12 for v in student.features.values())


def test_attention_by_hand():
    attention = attention_map(torch.tensor([[[[3.0, 0.0]], [[1.0, 2.0]]]]))  # squares' means 5 and 2
    torch.testing.assert_close(attention, torch.tensor([[5.0, 2.0]]) / 29**0.5)
    assert torch.equal(attention_map(torch.zeros(1, 2, 2, 2)), torch.zeros(1, 4))


def test_selectivity_is_the_same_either_way():
    s, t = torch.randn(2, 3, 4, 4).double(), torch.randn(2, 40, 4, 4).double()
    term = NeuronSelectivity()
    by_positions = term.compare(s, t)
    s, t = (nn.functional.normalize(x.flatten(2), dim=2) for x in (s, t))
    k = [(a @ b.mT).square().mean() for a, b in ((t, t), (s, s), (s, t))]
    torch.testing.assert_close(by_positions, k[0] + k[1] - 2 * k[2])


def test_boundary_by_hand():
    student, teacher = torch.tensor([[-2.0, 0.5], [0.5, 3.0]]), torch.tensor([[-1.0, 0.0], [2.0, 1.0]])
    # inactive: -2 is beyond the margin, 0.5 pays 1.5²; active: 0.5 pays 0.5², 3 is beyond it
    loss = ActivationBoundary(margin=1.0, scale=1.0).compare(student[:, :, None, None], teacher[:, :, None, None])
    assert loss.item() == pytest.approx((2.25 + 0.25) / 2)


def test_margin_is_the_mean_of_the_negative_part():
    torch.manual_seed(0)
    draws = torch.randn(400_000) * 2 + 0.5
    margin = normal_margin(torch.tensor([0.5]), torch.tensor([-2.0]))
    assert margin.item() == pytest.approx(draws[draws < 0].mean().item(), rel=0.01)
    assert normal_margin(torch.tensor([10.0]), torch.tensor([1.0])).item() == -3.0
    assert normal_margin(torch.tensor([-1.0, 1.0]), torch.zeros(2)).tolist() == [-1.0, 0.0]


def test_running_margins_equal_those_of_a_batch_norm():
    term, teacher = Overhaul("stage1"), nn.BatchNorm2d(4).train()
    nn.init.normal_(teacher.weight)
    nn.init.normal_(teacher.bias)
    output = Output(torch.zeros(64, 2), {"stage1": teacher(torch.randn(64, 4, 4, 4)).detach()})
    term.setup(output, output, 2, 8)
    running = term.train().moments[0](output.features["stage1"])
    torch.testing.assert_close(running, normal_margin(teacher.bias, teacher.weight), rtol=1e-3, atol=1e-4)
    term.set_margins([(torch.ones(4), torch.full((4,), -1.0))])
    before = term.moments[0].mean.clone()
    term(output, output, some_batch(64))
    assert torch.equal(term.moments[0].mean, before)


def test_hierarchy_by_hand():
    student, teacher = torch.zeros(1, 1, 2, 2), torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])
    assert hierarchical_distance(student, teacher).item() == pytest.approx((7.5 + 0.5 * 6.25) / 1.5)
    assert hierarchical_distance(student[..., :1, :1], teacher[..., :1, :1]).item() == 1.0


def test_ofa_is_cross_entropy_with_the_teacher_at_exponent_one():
    s, t, y = torch.randn(4, 6), torch.randn(4, 6), torch.arange(4)
    expected = nn.functional.cross_entropy(s, t.softmax(1))
    torch.testing.assert_close(adapted_soft_targets(s, t, y), expected)
    soft = nn.functional.one_hot(y, 6) * 0.6 + 0.05
    torch.testing.assert_close(adapted_soft_targets(s, t, soft, 1.5), adapted_soft_targets(s, t, y, 1.5))


def test_factors_learn_the_paraphraser_first():
    term, student, teacher = prepared("ft", "cnn->cnn", paraphraser_epochs=1.0, weight=200.0)
    batch = some_batch(epoch=0.5)
    term(student(batch.images), teacher(batch.images), batch).backward()
    assert all(p.grad is not None for p in term.paraphrasers.parameters())
    assert all(p.grad is None for p in [*term.translators.parameters(), *student.parameters()])
    term.zero_grad(set_to_none=True)
    batch.epoch = 1.0
    term(student(batch.images), teacher(batch.images), batch).backward()
    assert all(p.grad is None for p in term.paraphrasers.parameters())
    assert all(p.grad is not None for p in term.translators.parameters())


# gradients

shapes = st.tuples(
    st.integers(1, 3), st.integers(1, 3), st.integers(2, 4), st.integers(1, 4), st.integers(0, 2**31 - 1)
)


def random_outputs(shape):
    """Outputs in float64 with features of unlike sizes, and a head."""
    rows, channels, high, low, seed = shape
    torch.manual_seed(seed)
    sizes = {"stage1": high, "stage2": low, "stage3": low + 1, "stage4": high}
    student = {n: torch.randn(rows, channels, s, s, dtype=torch.float64) for n, s in sizes.items()}
    teacher = {n: torch.randn(rows, channels + 1, low + 1, low + 1, dtype=torch.float64) for n in sizes}
    student["penultimate"] = torch.randn(rows, channels, dtype=torch.float64)
    teacher["penultimate"] = torch.randn(rows, 4, dtype=torch.float64)
    head = nn.Linear(4, CLASSES, dtype=torch.float64)
    logits = [torch.randn(rows, CLASSES, dtype=torch.float64) for _ in range(2)]
    return Output(logits[0], student), Output(logits[1], teacher, head)


@pytest.mark.parametrize("name", TERMS)
@settings(max_examples=4, deadline=None, derandomize=True)
@given(shape=shapes)
def test_gradcheck(name, shape):
    """Against finite differences, in the student's features and in the term's own parameters."""
    student, teacher = random_outputs(shape)
    term, batch = TERMS[name](), some_batch(shape[0])
    term.setup(student, teacher, CLASSES, 8)
    term = term.double().train()
    wanted = {n: student.features[n].requires_grad_() for n in term.student_features}
    for module in term.modules():
        if isinstance(module, Norm):
            nn.init.normal_(module.bias)  # off the ReLU's kink at 0
    own = [p for n, p in term.named_parameters() if p.requires_grad and p.numel() <= 20 and "paraphraser" not in n]
    logits = student.logits.requires_grad_()

    def loss(*_):
        return term(student, teacher, batch)

    term(student, teacher, batch)  # running moments settle
    assert torch.autograd.gradcheck(loss, [*wanted.values(), logits, *own], eps=1e-7, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", TERMS)
def test_nothing_reaches_the_teacher(name):
    term, student, teacher = prepared(name, "cnn->cnn")
    teacher.requires_grad_(True)
    batch = some_batch()
    term(student(batch.images), teacher(batch.images), batch).backward()
    assert all(p.grad is None for p in teacher.parameters())


# numerics


@pytest.mark.parametrize("name", TERMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [0.0, 1e-6, 1e3])
@pytest.mark.parametrize("rows", [1, 3])
def test_finite_for_extreme_features(name, dtype, scale, rows):
    """Zero, tiny and huge features, in the student and in the teacher; batch 1."""
    for who in ("student", "teacher", "both"):
        student, teacher = random_outputs((rows, 2, 4, 2, 0))
        teacher.head = teacher.head.float()
        term = TERMS[name]()
        for output, owner in ((student, "student"), (teacher, "teacher")):
            factor = scale if who in (owner, "both") else 1.0
            output.features = {k: (v * factor).to(dtype).requires_grad_() for k, v in output.features.items()}
            output.logits = (output.logits * factor).to(dtype).requires_grad_()
        term.setup(student, teacher, CLASSES, 8)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = term.train()(student, teacher, some_batch(rows))
        loss.backward()
        leaves = [*student.features.values(), student.logits, *term.parameters()]
        assert loss.isfinite() and loss.dtype == torch.float32
        assert all(x.grad is None or x.grad.isfinite().all() for x in leaves)


def test_exits_are_finite_at_large_logits():
    s = (torch.randint(-1, 2, (4, 6)) * 200.0).requires_grad_()
    for temperature in (0.05, 1.0, 20.0):
        loss = adapted_soft_targets(s, -s.detach(), torch.arange(4), 1.5, temperature)
        loss.backward()
        assert loss.isfinite() and s.grad.isfinite().all()


# pairs


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("name", TERMS)
def test_trains_a_pair(name, pair):
    """A dozen steps on one batch bring the term down; everything that learns gets a finite gradient."""
    if name in NEED_POSITIONS and "mlp" in pair:
        with pytest.raises(ValueError, match=r"Choose\s+stages"):
            prepared(name, pair)
        return
    term, student, teacher = prepared(name, pair)
    batch = some_batch(8, soft=True)
    parameters = [p for p in [*student.parameters(), *term.parameters()] if p.requires_grad]
    optimizer, losses = torch.optim.Adam(parameters, lr=0.01), []
    goal = teacher(batch.images)
    for _ in range(12):
        optimizer.zero_grad()
        loss = term(student(batch.images), goal, batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(p.grad is None or p.grad.isfinite().all() for p in parameters)
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in student.parameters())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", TERMS)
def test_state_goes_round(name):
    """A fresh term of the same pair, given the trained one's state, says the same."""
    term, student, teacher = prepared(name, "vit->cnn")
    batch = some_batch()
    s, t = student.eval()(batch.images), teacher(batch.images)
    term(s, t, batch)
    other = prepared(name, "vit->cnn")[0]
    other.load_state_dict(copy.deepcopy(term.state_dict()))
    assert torch.equal(other.eval()(s, t, batch), term.eval()(s, t, batch))


# the reused head


def test_simkd_predicts_with_the_teachers_head():
    term, student, teacher = prepared("simkd", "cnn->cnn")
    assert (term.target, term.teacher_features, term.head.spec["relu"]) == ("map", ("stage4",), True)
    output = student.eval()(some_batch().images)
    term.eval()
    stage, head = term.shipped()
    rebuilt = GraftedHead(**head.spec)
    rebuilt.load_state_dict(head.state_dict())
    logits = term.student_logits(output)
    assert logits.shape == (6, CLASSES)
    assert torch.equal(rebuilt.eval()(output.features[stage]), logits)
    assert torch.equal(head.classifier.weight, teacher.head.weight)
    assert not any(p.requires_grad for p in head.classifier.parameters())


def test_simkd_follows_the_vector_that_a_vits_head_is_given():
    term, *_ = prepared("simkd", "vit->cnn")
    assert (term.target, term.teacher_features, term.head.spec["relu"]) == ("penultimate", ("penultimate",), False)


def test_a_perfect_projection_has_the_teachers_predictions():
    """srrl with the connector at the identity: nothing left to learn."""
    torch.manual_seed(0)
    feature, head = torch.rand(4, 3, 2, 2).double(), nn.Linear(3, CLASSES).double()
    output = Output(head(feature.mean((2, 3))), {"stage4": feature, "penultimate": feature.mean((2, 3))}, head)
    term = SoftmaxRegression()
    term.setup(output, output, CLASSES, 8)
    term.double().connector = nn.Identity()
    assert term(output, output, some_batch(4)).item() == pytest.approx(0.0, abs=1e-25)


def test_heads_that_are_not_linear():
    with pytest.raises(ValueError, match="gives none"):
        linear_head(None, 3)
    with pytest.raises(ValueError, match="not linear"):
        linear_head(nn.Sequential(nn.Linear(3, 4), nn.ReLU()), 3)
    with pytest.raises(ValueError, match="takes 4 features"):
        linear_head(nn.Linear(4, 2), 3)
    wrapped = nn.Sequential(nn.Dropout(0.5), nn.Linear(3, 4))
    layer, x = linear_head(wrapped, 3), torch.randn(2, 3)
    torch.testing.assert_close(layer(x), wrapped.eval()(x))
    half = linear_head(copy.deepcopy(wrapped).bfloat16(), 3)  # a frozen teacher's, on a GPU
    assert half.weight.dtype == torch.float32
    torch.testing.assert_close(half(x), layer(x), rtol=0.02, atol=0.02)


def test_errors_say_what_can_be_done():
    with pytest.raises(ValueError, match="at least two"):
        prepared("fsp", "cnn->cnn", stages="stage4")
    with pytest.raises(ValueError, match="as many"):
        AttentionTransfer(stages=["stage1"], teacher_stages=["stage1", "stage2"])
    with pytest.raises(ValueError, match="at least 1"):
        AttentionTransfer(power=0.5)
    with pytest.raises(ValueError, match="or 5 of"):
        OneForAll(exponent=[1.0, 1.0])
    with pytest.raises(ValueError, match="connect: false"):
        prepared("ab", "cnn->cnn", connect=False)
    with pytest.raises(ValueError, match="'linear' or"):
        FitNet(regressor="mlp")


def test_terms_sum_with_their_schedule():
    """The sum asks for the union of the features and leaves a term out before it counts."""
    total = LossSum({"at": AttentionTransfer(weight=2.0), "ab": ActivationBoundary(first_epochs=3.0)})
    assert total.student_features == ["stage2", "stage3", "stage4"]
    assert total.factors(1.0) == {"at": 0.0, "ab": 1.0}
    assert total.factors(3.0) == {"at": 2.0, "ab": 0.0}


# what the golden vectors catch


def detached_variance(self, regressor, log_scale, student, teacher):
    variance = (nn.functional.softplus(log_scale) + self.eps)[None, :, None, None].detach()
    return 0.5 * ((regressor(student) - teacher).square() / variance + variance.log()).mean()


def inclusive_boundary(self, student, teacher):
    zero, margin = student.new_zeros(()), self.margin
    inactive = torch.where((student > -margin) & (teacher <= 0), student + margin, zero)
    active = torch.where(teacher > 0, student - margin, zero)  # also beyond the margin
    return self.scale * (inactive.square() + active.square()).sum() / len(student)


def unsigned_selectivity(self, student, teacher):
    s, t = (nn.functional.normalize(x.flatten(2), dim=2) for x in (student, teacher))
    k = [(a @ b.mT).square().mean() for a, b in ((t, t), (s, s.detach()), (s, t))]  # half of the gradient of k(S, S)
    return k[0] + k[1] - 2 * k[2]


@pytest.mark.parametrize(
    ("method", "owner", "name", "wrong"),
    [
        ("vid", Variational, "likelihood", detached_variance),
        ("ab", ActivationBoundary, "compare", inclusive_boundary),
        ("nst", NeuronSelectivity, "compare", unsigned_selectivity),
    ],
)
def test_a_wrong_formula_is_caught(monkeypatch, method, owner, name, wrong):
    """The check of test_vectors passes with the formula, and fails with a mutated one."""
    import test_vectors as vectors

    case = vectors.METHODS[method]["cases"]["case0"]
    vectors.test_golden(method, "case0", case)
    monkeypatch.setattr(owner, name, wrong)
    with pytest.raises(AssertionError, match="error"):
        vectors.test_golden(method, "case0", case)


@pytest.mark.parametrize(
    "method", ["fitnet", "at", "vid", "ab", "ft", "nst", "ofd", "reviewkd_hcl", "simkd", "srrl", "ofa"]
)
def test_a_gradient_one_in_a_million_off_is_caught(monkeypatch, method):
    """The right value with a gradient that is 1 + 1e-6 times itself fails the check of test_vectors."""
    import test_vectors as vectors

    right = Term.__call__

    def slightly_steeper(self, *inputs):
        loss = right(self, *inputs)
        return loss + 1e-6 * (loss - loss.detach())

    case = vectors.METHODS[method]["cases"]["case0"]
    monkeypatch.setattr(Term, "__call__", slightly_steeper)
    with pytest.raises(AssertionError, match=r"grad.*error"):
        vectors.test_golden(method, "case0", case)
