"""Study files, overrides and identity."""

import dataclasses
import re

import pytest

from hpo import study
from hpo.cli import main, studies
from hpo.errors import StudyError
from models import sizes, specs


def load(tmp_path, text, *overrides):
    path = tmp_path / "mine.toml"
    path.write_text(text)
    return study.load(str(path), overrides)


MINIMAL = """
[model]
family = "cnn"
kernel_size = 3
dropout = 0.0
[sampler]
name = "random"
trials = 5
[space]
filters = [4, 8]
learning_rate = {low = 1e-4, high = 1e-2, log = true}
"""

INTERVAL = MINIMAL.replace("[4, 8]", "{low = 4, high = 8, step = STEP}")


def identity(each, data="d", split="s"):
    return study.digest(each.canonical(data_digest=data, split_digest=split))


def test_the_grid_has_the_protocols_24_points_in_its_order():
    points = study.load("grid").grid()
    assert len(points) == 24
    assert points[0] == {"filters": 8, "kernel_size": 3, "dropout": 0.0, "learning_rate": 1e-3}
    assert points[1] == {"filters": 8, "kernel_size": 3, "dropout": 0.0, "learning_rate": 1e-4}
    assert points[22] == {"filters": 32, "kernel_size": 5, "dropout": 0.2, "learning_rate": 1e-3}


def test_config_22_has_the_parameter_count_of_the_protocol():
    grid = study.load("grid")
    model, training = grid.trial(grid.grid()[22])
    assert sizes.size(specs.from_dict(model), (1, 64, 64), 9).parameters == 1_101_321
    assert training["epochs"] == 300 and training["batch_size"] == 32


def test_an_override_that_changes_nothing_leaves_name_and_identity():
    plain, same = study.load("grid"), study.load("grid", ["training.epochs=300"])
    assert identity(plain) == identity(same)
    assert study.full_name(same, identity(same)) == "grid"


def test_any_other_override_appends_eight_digits_of_the_identity():
    other = study.load("grid", ["training.epochs=10"])
    assert study.full_name(other, identity(other)) == f"grid+{identity(other)[:8]}"


def test_the_name_says_that_no_backbone_is_pretrained():
    bare = study.load("tl-head", ["model.weights=none"])
    assert study.full_name(bare, identity(bare)) == f"tl-head-not-pretrained+{identity(bare)[:8]}"
    assert study.file_name(study.full_name(bare, identity(bare))) == "tl-head"
    name = study.full_name(bare, identity(bare))
    again = study.restore(name, bare.canonical(data_digest="d", split_digest="s"))
    assert study.full_name(again, identity(bare)) == name
    both = {**bare.space, "weights": study.Choices(values=("none", "imagenet"))}
    mixed = dataclasses.replace(bare, space=both)
    assert study.full_name(mixed, "0123456789") == "tl-head+01234567"


@pytest.mark.parametrize("override", ["training.epochs=10", "seed=1", "space.filters=[8]", "training.learning_rate=1"])
def test_every_setting_that_moves_a_number_is_in_the_identity(override):
    if override == "training.learning_rate=1":
        with pytest.raises(StudyError, match="'learning_rate' stands in \\[space\\] and in \\[training\\]"):
            study.load("grid", [override])
        return
    assert identity(study.load("grid", [override])) != identity(study.load("grid"))


def test_other_data_or_another_split_is_another_identity():
    grid = study.load("grid")
    assert len({identity(grid), identity(grid, data="e"), identity(grid, split="t")}) == 3


def test_writing_a_default_out_is_the_same_study(tmp_path):
    assert identity(load(tmp_path, MINIMAL)) == identity(load(tmp_path, MINIMAL + "[training]\nepochs = 300\n"))


def test_a_canonical_spec_restores_the_study(tmp_path):
    for each in (study.load("grid"), *study.load_all("periodic"), load(tmp_path, MINIMAL)):
        canonical = each.canonical(data_digest="d", split_digest="s")
        assert study.restore(each.name, canonical).canonical(data_digest="d", split_digest="s") == canonical


def test_the_data_path_of_a_file_counts_from_the_file(tmp_path):
    assert load(tmp_path, MINIMAL + '[data]\npath = "cells"\n').data_path == str(tmp_path / "cells")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("grid", "ae2064f8fd2620f6cbe6e00365c1b9af5de09c5235ec4f037d2809bca58c9415"),
        ("periodic-search", "3fb1ca0932ab3a487e6837fa93bb260b3d599b2e2e165daac81687d868b2146b"),
        ("periodic-best", "9184f120f9b63421ae8202a22335e9971f1477d70416c1d09bba4a1adbdf1a0d"),
    ],
)
def test_the_identity_of_what_people_have_run_is_what_it_was(name, expected):
    assert identity(study.load(name)) == expected


WEIGHTS = {"vgg16": "a", "resnet50": "b", "densenet121": "c"}


def whole(each, **changes):
    return each.canonical(data_digest="d", split_digest="s", weights=WEIGHTS | changes)


def test_the_shipped_transfer_studies_are_the_protocols():
    baseline, _, head, finetune = study.load_all("protocol")
    assert [each.name for each in study.load_all("protocol")] == ["baseline", "grid", "tl-head", "tl-finetune"]
    assert (baseline.model, baseline.trials, baseline.grid()) == ({"family": "baseline"}, 1, [{}])
    for each, trainable, rate in ((head, "head", 1e-3), (finetune, "all", 1e-4)):
        assert [point["backbone"] for point in each.grid()] == ["vgg16", "resnet50", "densenet121"]
        assert each.model == {"family": "transfer", "weights": "imagenet", "trainable": trainable}
        assert each.training["learning_rate"] == rate
        assert each.report_by == ("backbone",)
    for each in (baseline, head, finetune):
        assert (each.training["epochs"], each.training["batch_size"]) == (300, 32)
        assert each.pruner == {"name": "none"} and "patience" not in each.training
    assert finetune.starts_from == head


def test_grid_fast_has_the_points_of_the_grid():
    assert study.load("grid-fast").grid() == study.load("grid").grid()
    assert study.load("grid-fast").pruner["name"] == "successive-halving"


def test_the_digest_of_pretrained_weights_is_in_the_identity_of_all_that_use_them():
    for name in ("tl-head", "tl-finetune"):
        each = study.load(name)
        assert study.digest(whole(each)) != study.digest(whole(each, vgg16="z"))
        assert study.restore(name, whole(each)).canonical(data_digest="d", split_digest="s", weights=WEIGHTS) == whole(
            each
        )
    assert "weights" not in whole(study.load("tl-head", ["model.weights=none"]))
    changed = study.load("tl-finetune", ["tl-head:training.epochs=5"])
    assert changed.overridden and study.digest(whole(changed)) != study.digest(whole(study.load("tl-finetune")))


def test_an_override_of_one_study_goes_before_an_option_for_all_of_a_sequence():
    words = ["run", "--study", "protocol", "--epochs", "2", "--set", "grid:training.epochs=3", "--seed", "5"]
    chosen = studies.load(main.parser().parse_args([*words, "--set", "baseline:seed=9"]))
    assert [each.training["epochs"] for each in chosen] == [2, 3, 2, 2]
    assert [each.seed for each in chosen] == [9, 5, 5, 5]


def test_an_override_of_a_sequence_goes_to_the_studies_that_have_its_key():
    words = ["training.epochs=3", "model.weights=none", "training.learning_rate=0.5", "space.filters=[8]"]
    baseline, grid, head, finetune = study.load_all("protocol", words)
    assert {each.training["epochs"] for each in (baseline, grid, head, finetune)} == {3}
    assert [each.training.get("learning_rate") for each in (baseline, grid, head, finetune)] == [0.5, None, 0.5, 0.5]
    assert len(grid.grid()) == 8 and head.model["weights"] == finetune.model["weights"] == "none"
    assert finetune.starts_from == head, "prerequisites have the same overrides"
    assert [each.overridden for each in study.load_all("protocol", ["model.weights=none"])] == [
        False,
        False,
        True,
        True,
    ]
    only = study.load_all("protocol", ["tl-finetune:training.learning_rate=1e-5"])
    assert [each.overridden for each in only] == [False, False, False, True]
    with pytest.raises(
        StudyError, match=r"space.depth=\[1\]: none of baseline, grid, tl-head, tl-finetune has this key"
    ):
        study.load_all("protocol", ["space.depth=[1]"])
    with pytest.raises(StudyError, match=r"unknown key 'training\.epoch'"):
        study.load_all("protocol", ["training.epoch=1"])


def test_prerequisites_come_first_and_once():
    names = lambda *words: [each.name for each in study.load_all(*words, prerequisites=True)]  # noqa: E731
    assert names("tl-finetune") == ["tl-head", "tl-finetune"]
    assert names("protocol") == ["baseline", "grid", "tl-head", "tl-finetune"]
    assert names("grid") == ["grid"]


def test_sequences_and_starts_count_paths_from_the_file(tmp_path):
    (tmp_path / "all.toml").write_text('sequence = ["mine.toml", "baseline"]')
    (tmp_path / "mine.toml").write_text(MINIMAL)
    assert [each.name for each in study.load_all(str(tmp_path / "all.toml"))] == ["mine", "baseline"]
    with pytest.raises(StudyError, match="is a sequence of studies: name one of mine, baseline"):
        study.load(str(tmp_path / "all.toml"))
    (tmp_path / "loop.toml").write_text('starts_from = "loop.toml"\n' + MINIMAL)
    with pytest.raises(StudyError, match="another study follows 'loop'"):
        study.load(str(tmp_path / "loop.toml"))


def test_repeats_and_pruners_are_part_of_the_identity_when_they_are_used():
    grid = study.load("grid")
    for words in (["repeats=2"], ["pruner.name=median"], ["pruner.name=median", "pruner.warmup_epochs=3"]):
        each = study.load("grid", words)
        assert identity(each) != identity(grid)
        canonical = each.canonical(data_digest="d", split_digest="s")
        assert study.restore("grid", canonical).canonical(data_digest="d", split_digest="s") == canonical
    assert identity(study.load("grid", ["repeats=1", "pruner.name=none"])) == identity(grid)
    for words in (["training.patience=5"], ["training.precision=bf16"]):
        assert identity(study.load("grid", words)) != identity(grid)


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("grid", ["pruner.name=media"], "pruner.name: expected one of none, median,"),
        ("grid", ["pruner.name=media"], "Did you mean 'median'"),
        ("grid", ["pruner.name=median", "pruner.min_epochs=3"], "unknown key 'pruner.min_epochs'"),
        (
            "grid",
            ["pruner.name=hyperband", "pruner.reduction_factor=1"],
            "pruner.reduction_factor: expected a whole number from 2 to 10000000, found 1",
        ),
        ("grid", ["pruner.min_epochs=3"], "Valid keys here: none"),
        ("grid", ["repeats=0"], "repeats: expected a whole number from 1 to 1000, found 0"),
        ("grid-fast", ["repeats=2"], "repeats and a pruner do not go together"),
        ("grid", ["starts_from=tl-head"], 'starts_from: expected model.family = "transfer" here'),
        ("tl-finetune", ["tl-finetune:seed=1"], "starts_from: expected the seed of tl-head, 0, found 1"),
        ("tl-finetune", ["tl-head:space.backbone=['vgg16']"], "starts_from: tl-head has no backbone densenet121, resn"),
        ("tl-head", ["space.backbone=['vgg19']"], "did you mean 'vgg16'"),
        ("tl-head", ["model.weights=nune"], "did you mean 'none'"),
    ],
)
def test_a_wrong_setting_of_pruners_repeats_and_transfer_is_named(name, overrides, message):
    with pytest.raises(StudyError) as caught:
        study.load(name, overrides)
    assert message in str(caught.value)


TPE = MINIMAL.replace("random", "tpe")
START = "[[start]]\nlearning_rate = 3e-3\nfilters = 8\n"


def test_start_and_multivariate_are_part_of_the_identity_when_they_are_used(tmp_path):
    plain, started = load(tmp_path, TPE), load(tmp_path, TPE + START)
    assert started.start == ({"filters": 8, "learning_rate": 3e-3},), "in the order of the space"
    together = load(tmp_path, TPE, "sampler.multivariate=true")
    assert len({identity(plain), identity(started), identity(together)}) == 3
    assert identity(load(tmp_path, TPE, "sampler.multivariate=false")) == identity(plain)
    assert not {"start", "multivariate"} & {*whole(plain), *whole(plain)["sampler"]}
    for each in (started, together):
        assert study.restore("mine", whole(each)).canonical(data_digest="d", split_digest="s") == whole(each)


def test_a_study_of_the_best_has_seeds_repeats_and_training_of_its_own(tmp_path):

    def write(text, name):
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    write(TPE, "searched.toml")
    best = 'best_of = "searched.toml"\npoints = 2\nrepeats = 3\nseed = 7\n'
    path = write(best + "[training]\nepochs = 50\n", "again.toml")
    each = study.load(path)
    first = each.best_of
    assert first is not None and (first.name, first.sampler) == ("searched", "tpe")
    assert (each.trials, each.repeats, each.seed, first.seed) == (2, 3, 7, 0)
    assert (each.model, each.space, each.data_path) == (first.model, first.space, first.data_path)
    assert each.training == first.training | {"epochs": 50}
    assert study.restore("again", whole(each)).canonical(data_digest="d", split_digest="s") == whole(each)
    changed = study.load(path, ["training.batch_size=8", "sampler.trials=5", "seed=3"])
    assert changed.overridden and changed.best_of is not None and changed.best_of.trials == 5
    assert changed.training["batch_size"] == changed.best_of.training["batch_size"] == 8
    assert [one.name for one in study.load_all(path, prerequisites=True)] == ["searched", "again"]
    for text, message in (
        (best + '[sampler]\nname = "tpe"\n', "unknown key 'sampler'. Valid keys here: description, seed, repeats"),
        (best.replace("points = 2", ""), "points: expected a whole number, found nothing"),
        (MINIMAL.replace("[model]", "points = 2\n[model]", 1), "points: they are those of the study that best_of"),
        ('best_of = "again.toml"\npoints = 1\n', "another study follows 'again', so it cannot follow one itself"),
    ):
        with pytest.raises(StudyError, match=re.escape(message)):
            study.load(write(text, "wrong.toml"))


def seeds(*overrides):
    return [range(each.seed, each.seed + each.repeats) for each in study.load_all("periodic", overrides)]


def test_the_best_are_trained_with_other_seeds_than_the_search_in_any_case(tmp_path):
    assert seeds() == [range(1), range(1, 4)]
    assert seeds("seed=5") == [range(5, 6), range(6, 9)]
    assert seeds("periodic-search:seed=2") == [range(2, 3), range(3, 6)], "as far from it as the files say"
    assert seeds("periodic-best:seed=7", "repeats=2") == [range(1), range(7, 9)]
    assert study.load("periodic-best", ["seed=5"]) == study.load_all("periodic", ["seed=5"])[1]
    (tmp_path / "searched.toml").write_text(TPE.replace("[model]", "seed = 3\nrepeats = 2\n[model]", 1))
    (tmp_path / "again.toml").write_text('best_of = "searched.toml"\npoints = 1\n')
    assert study.load(str(tmp_path / "again.toml")).seed == 5, "a file without a seed takes the next ones"
    for words in (["periodic-best:seed=0"], ["pruner.name=none", "periodic-search:repeats=2"]):
        with pytest.raises(
            StudyError, match="best configurations are trained with other seeds than in periodic-search: exp"
        ):
            study.load_all("periodic", words)


def test_overrides_of_the_search_reach_what_its_best_points_are_points_of(tmp_path):
    cells, words = str(tmp_path / "cells"), ("model.stride=4", "space.width=[8, 24]", "training.batch_size=8")
    for scope in ("periodic-search:", ""):
        search, best = study.load_all("periodic", [scope + each for each in (*words, f"data.path={cells}")])
        assert best.best_of == search and best.overridden
        assert (best.model, best.space, best.data_path) == (search.model, search.space, cells)
        assert (best.model["stride"], best.space["width"].values, best.training["batch_size"]) == (4, (8, 24), 8)
    search, best = study.load_all("periodic", ["periodic-best:training.epochs=9"])
    assert (search.training["epochs"], best.training["epochs"], search.overridden) == (700, 9, False)


def test_an_override_goes_past_studies_that_cannot_have_it():
    search, best = study.load_all("periodic", ["repeats=2", "points=1", "sampler.trials=3", "pruner.min_epochs=20"])
    assert (search.repeats, search.trials, search.pruner["min_epochs"]) == (1, 3, 20)
    assert (best.repeats, best.trials, best.pruner) == (2, 1, {"name": "none"})
    assert study.load_all("periodic", ["pruner.name=median"])[0].pruner == {"name": "median", **study.PRUNERS["median"]}
    for words in ("sampler.trials=3", "start=[]", "report_by=['width']", "pruner.name=none", "model.stride=1"):
        root = words.partition("=")[0].partition(".")[0]
        with pytest.raises(
            StudyError, match=f"periodic-best: unknown key '{root}'. Valid keys here: description, seed"
        ):
            study.load_all("periodic", [f"periodic-best:{words}"])
    with pytest.raises(StudyError, match="none of periodic-search, periodic-best has this key"):
        study.load_all("periodic", ["report_by=['width']"])


@pytest.mark.parametrize("key", ["data", "model", "sampler", "pruner", "space", "training"])
def test_a_value_in_the_place_of_a_table_is_named_when_an_override_meets_it(tmp_path, key):
    (tmp_path / "all.toml").write_text('sequence = ["mine.toml"]')
    (tmp_path / "mine.toml").write_text(f"{key} = 3\n")
    for override in ("repeats=2", "training.epochs=3", "model.depth=3", "pruner.name=median", "sampler.trials=3"):
        with pytest.raises(StudyError):
            study.load_all(str(tmp_path / "all.toml"), [override])
    (tmp_path / "mine.toml").write_text(MINIMAL.replace('"cnn"', '["cnn"]'))
    with pytest.raises(StudyError, match=r"model\.family: expected text"):
        study.load_all(str(tmp_path / "all.toml"), ["repeats=2", "model.dropout=0.1"])


@pytest.mark.parametrize(
    ("space", "strides"), [("[1, 3, 2]", [1, 3, 2]), ("{low = 1, high = 5, step = 2}", [1, 3, 5]), ("[2]", [2])]
)
def test_the_largest_networks_of_a_space_are_there_with_every_stride(tmp_path, space, strides):
    text = TPE.replace("[4, 8]", f"[4, 8]\nstride = {space}").replace("filters", "width")
    each = load(tmp_path, text.replace('"cnn"', '"periodic"').replace("dropout = 0.0", ""))
    assert each.largest() == [{"width": 8, "stride": stride, "learning_rate": 1e-2} for stride in strides]


def test_the_periodic_study_starts_from_the_models_defaults():
    each = study.load("periodic-search")
    model, training = each.trial(each.start[0])
    assert specs.from_dict(model) == specs.PeriodicSpec(physics="bounded")
    assert (training["epochs"], training["ema"], training["augmentation"]) == (700, 0.99, "symmetry")
    assert each.multivariate and each.needs_symmetries()
    assert not study.load("grid").needs_symmetries()
    assert study.load("grid", ["training.augmentation=symmetry"]).needs_symmetries()
    for point in each.corners():  # tens to hundreds of thousands of parameters
        assert 4_000 < sizes.size(specs.from_dict(each.trial(point)[0]), (1, 64, 64), 9).parameters < 1_000_000


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            MINIMAL + "[[start]]\nfilters = 8\n",
            "start[0].learning_rate: expected a number from 0.0001 to 0.01, found noth",
        ),
        (MINIMAL + START + START.replace("8", "5"), "start[1].filters: expected one of 4, 8, found 5"),
        (MINIMAL + START.replace("3e-3", "3e-1"), "learning_rate: expected a number from 0.0001 to 0.01, found 0.3"),
        (MINIMAL + START + "depth = 3\n", "unknown key 'start[0].depth'. Valid keys here: filters, learning_rate"),
        (MINIMAL + "[start]\nfilters = 8\n", "start: expected a list, found {'filters': 8}"),
        (MINIMAL + 6 * START, "start: expected at most sampler.trials = 5 points, found more"),
        (
            'learn_from = ["grid"]\n' + MINIMAL,
            "a sampler that learns (tpe, gp), found ['grid'] and sampler.name = 'random'",
        ),
        ("learn_from = [3]\n" + TPE, "(tpe, gp), found [3] and sampler.name = 'tpe'"),
        ('learn_from = ["a", "a"]\n' + TPE, "expected names of studies, each once, beside a sampler"),
        (MINIMAL.replace("= 5", "= 5\nmultivariate = true"), "only \"tpe\" has it, found sampler.name = 'random'"),
        (TPE.replace("= 5", "= 5\nmultivariate = 1"), "sampler.multivariate: expected true or false, found 1"),
        (
            MINIMAL.replace("[4, 8]", "{low = 2, high = 8, step = 3}") + START.replace("8", "7"),
            "start[0].filters: expected a whole number from 2 to 8 in steps of 3, found 7",
        ),
        (MINIMAL + '[training]\nschedule = "cosin"\n', "did you mean 'cosine'"),
        (MINIMAL + "[training]\nema = 1\n", "ema = 1.0; expected a number, at least 0 and below 1"),
        (
            '[model]\nfamily = "transfer"\nbackbone = "vgg16"\n[training]\naugmentation = "symmetry"\n',
            "augmentation: the features of a frozen backbone are computed once",
        ),
    ],
)
def test_a_wrong_start_or_setting_of_the_optimisation_is_named(tmp_path, text, message):
    with pytest.raises(StudyError) as caught:
        load(tmp_path, text)
    assert message in str(caught.value)


def test_a_step_beyond_the_highest_value_leaves_the_lowest_alone(tmp_path):
    space = "[4, 8]\nkernel_size = {low = 3, high = 5, step = 3}"  # 6 is even, but no point of it
    assert load(tmp_path, MINIMAL.replace("kernel_size = 3", "").replace("[4, 8]", space)).trials == 5


def test_an_end_that_no_step_reaches_is_no_point(tmp_path):
    space = "[4, 8]\nkernel_size = {low = 1, high = 8, step = 2}"  # 8 is even, but 7 is the last
    each = load(tmp_path, MINIMAL.replace("kernel_size = 3", "").replace("[4, 8]", space))
    assert {point["kernel_size"] for point in each.corners()} == {1, 7}
    assert each.largest() == [{"filters": 8, "kernel_size": 7, "learning_rate": 1e-2}]
    assert study.Interval(low=0.1, high=0.5, step=0.1).top == 0.5  # whatever 0.4 / 0.1 comes out as
    assert study.Interval(low=0.0, high=0.5, step=0.2).top == pytest.approx(0.4)
    assert each.canonical(data_digest="d", split_digest="s")["space"][1][1]["high"] == 8, "as it was written"


def test_zero_is_written_as_one_likes_and_the_study_stays_the_one_it_was(tmp_path):
    written = [study.load("grid", [f"space.dropout={each}"]) for each in ("[0, 0.2]", "[0.0, 0.2]")]
    assert len({identity(each) for each in written}) == 2, "both have been run under their own identity"


def test_a_name_has_room_behind_it(tmp_path):
    (tmp_path / ("n" * 201 + ".toml")).write_text(MINIMAL)
    with pytest.raises(StudyError, match="a name of at most 200 characters, found 201"):
        study.load(str(tmp_path / ("n" * 201 + ".toml")))


def test_a_grid_has_no_start():
    with pytest.raises(StudyError, match="start: a grid trains all its points: remove the key"):
        study.load("grid", ["start=[{filters = 8}]"])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["training.epoch=3"], "unknown key 'training.epoch'. Did you mean 'epochs'"),
        (["modell.family=cnn"], "unknown key 'modell'. Did you mean 'model'"),
        (["space.filter=[1]"], "unknown key 'space.filter'. Did you mean 'filters'"),
        (
            ["sampler.name=gird"],
            "sampler.name: expected one of grid, random, tpe, gp, qmc, found 'gird'. Did you mean 'grid'",
        ),
        (["model.family=cn"], "did you mean 'cnn'"),
        (["training.epochs=0"], "epochs = 0; expected a whole number, at least 1"),
        (["training.epochs=ten"], "epochs = 'ten'; expected a whole number"),
        (["space.filters=8"], "expected a list of values"),
        (["space.filters=[8, 8]"], "a value stands twice"),
        (["space.dropout=[0, 0.2, -0.0]"], "a value stands twice in [0, 0.2, -0.0]"),
        (["space.dropout=[0.0, 0]"], "a value stands twice"),
        (["training.batch_size=1000000000000000000000000"], "at least 1 and at most 2147483647"),
        (["training.epochs=100000000"], "at least 1 and at most 10000000"),
        (["space.filters=[]"], "expected a list of numbers"),
        (["space.dropout=[1.5]"], "dropout = 1.5; expected a number"),
        (["space.dropout={low = 0.0, high = 0.5}"], "a grid needs a list of values, found an interval"),
        (["sampler.trials=3"], "a grid trains all its points"),
        (["sampler.name=tpe"], "sampler.trials: expected a whole number, found nothing"),
        (["seed=-1"], "seed: expected a whole number from 0 to 4294967295, found -1"),
        (["seed=true"], "seed: expected a whole number, found True"),
        (["report_by=['depth']"], "report_by: expected parameters of"),
        (["report_by=[['filters']]"], "found ['filters']"),
        ([f"space.learning_rate=[1{400 * '0'}]"], "expected a number, above 0"),
        (["training.epochs"], "expected KEY=VALUE"),
        (["seed.more=1"], "'seed' is a value, not a table"),
    ],
)
def test_a_wrong_setting_is_named_with_what_was_expected(overrides, message):
    with pytest.raises(StudyError) as caught:
        study.load("grid", overrides)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gird", "Did you mean 'grid'? There are: "),
        ("nowhere/mine.toml", "there is no such study file"),
    ],
)
def test_an_unknown_study_is_named_with_what_there_is(name, message):
    with pytest.raises(StudyError) as caught:
        study.load(name)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model = [", "not valid TOML"),
        ("", "model.family: expected text in quotes, found nothing"),
        (MINIMAL + "[data]\nimage_size = 'big'\n", "data.image_size: expected a whole number"),
        (MINIMAL.replace("low = 1e-4", "low = 1.0"), "expected low < high"),
        (MINIMAL.replace("low = 1e-4", "low = 0.0"), "log = true needs low > 0"),
        (MINIMAL.replace("high = 1e-2", "hihg = 1e-2"), "unknown key 'space.learning_rate.hihg'. Did you mean 'high'"),
        (
            MINIMAL.replace("trials = 5", "trials = 0"),
            "sampler.trials: expected a whole number from 1 to 100000, found 0",
        ),
        (MINIMAL.replace("log = true", "log = 'yes'"), "log: expected true or false, found 'yes'"),
        (MINIMAL.replace("log = true", "step = inf"), "step: expected a positive number, found inf"),
        (INTERVAL.replace("STEP", "0.5"), "step: expected a positive whole number, found 0.5"),
        (INTERVAL.replace("STEP", "2.5"), "step: expected a positive whole number, found 2.5"),
        (INTERVAL.replace("STEP", "true"), "step: expected a positive whole number, found True"),
        (
            MINIMAL.replace("kernel_size = 3", "").replace("[4, 8]", "[4, 8]\nkernel_size = {low = 3, high = 7}"),
            "kernel_size = 4; expected an odd whole number",
        ),
    ],
)
def test_a_wrong_file_is_named_with_what_was_expected(tmp_path, text, message):
    with pytest.raises(StudyError) as caught:
        load(tmp_path, text)
    assert message in str(caught.value)


@pytest.mark.parametrize("name", ["champion", "Latest", "7", "v2"])
def test_a_file_may_not_take_a_name_the_registry_gives_a_meaning(tmp_path, name):
    path = tmp_path / f"{name}.toml"
    path.write_text(MINIMAL)
    with pytest.raises(StudyError, match="means something else to the model registry"):
        study.load(str(path))


def test_a_file_may_not_take_a_shipped_name(tmp_path):
    path = tmp_path / "grid.toml"
    path.write_text(MINIMAL)
    with pytest.raises(StudyError, match="is the name of a shipped study"):
        study.load(str(path))
