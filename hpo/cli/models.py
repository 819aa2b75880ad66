"""`hpo download`, `predict`, `evaluate`, `weights`: registered models and pretrained weights."""

import argparse
import json
import sys

from hpo import api
from hpo.cli import terminal
from hpo.cli.options import JSON, TRUST, command, exclusive, option
from hpo.text import counted, for_csv


@command(
    option("--study", "NAME", "the best model of this study, as `hpo studies` lists it"),
    option("--alias", "NAME", "alias or version (default: champion)"),
    option("--model", "NAME", "registered model (default: the only one, or the newest study's)"),
    option("folder", "DIR", "folder to make"),
)
def download(options: argparse.Namespace) -> int:
    """Download a registered model, checked against the hashes in the database."""
    from hpo.report import promotion

    if options.study is not None:
        others = {"--alias": options.alias, "--model": options.model}
        exclusive("--study", "takes the study's best model", others)
    model = api.download(options.folder, alias=options.alias or "champion", model=options.model, study=options.study)
    aliases = ", ".join(f"@{alias}" for alias in model.version.aliases) or "no alias"
    print(f"{model.name} version {model.version.number} ({aliases}) is in {model.folder}.")
    print(f"{counted(model.files, 'file')}, each as recorded in the database. Its README.md shows how to use it.")
    if (note := promotion.NOTES.get(model.version.tags.get("hpo.verdict", ""))) is not None:
        print(f"Note: {note}.")
    return 0


@command(
    option("folder", "DIR", "folder that `hpo download` made"),
    option(
        "images", "IMAGE", "image file, or array (FILE:KEY), of the size trained on (periodic networks: any)", nargs="+"
    ),
    option("--inputs", "FILE", "table of the numbers that the model takes beside an image; a column names the images"),
    TRUST,
    JSON,
)
def predict(options: argparse.Namespace) -> int:
    """Predict the targets of images with a downloaded model; CSV on standard output."""
    frame = api.predict(options.folder, options.images, options.inputs, trust_code=options.trust_code)
    unit = frame.attrs["unit"]
    if options.json:
        print(json.dumps({"unit": unit, "predictions": frame.to_dict("records")}, indent=2))
        return 0
    frame = frame.rename(columns={name: f"{name} [{own}]" for name, own in frame.attrs["units"].items()})
    terminal.exactly(for_csv(frame).to_csv(index=False))
    return 0


@command(
    option("model", "MODEL", "folder that `hpo download` made, @ALIAS, MODEL/NUMBER, MODEL@ALIAS, study or trial"),
    option("folder", "DIR", "folder of images and labels"),
    option("--image-size", "N", "resize to N x N pixels (default: as in the model's study)"),
    option("-o --output", "FILE", "HTML page to write"),
    TRUST,
    JSON,
)
def evaluate(options: argparse.Namespace) -> int:
    """Score a model on new labelled images, beside the baseline predictors; a run in MLflow keeps the result."""
    result = api.evaluate(
        options.model,
        options.folder,
        image_size=options.image_size,
        page=options.output,
        trust_code=options.trust_code,
    )
    if options.json:
        print(json.dumps(result.as_dict(), indent=2))
        return 0
    from hpo.report import evaluation, tables

    console = tables.console()
    for make in (evaluation.scores_table, evaluation.worst_table, evaluation.distance_table):
        tables.print_table(console, make(result))
    for line in [*result.summary, *(f"Note: {note}" for note in result.notes)]:
        console.print(line, soft_wrap=True)
    if result.link:
        print(f"In MLflow: {result.link}")
    if options.output:
        print(f"{options.output}: open it in a browser.")
    return 0


@command(option("files", "FILE", "torchvision's file, brought by hand", nargs="*"))
def weights(options: argparse.Namespace) -> int:
    """List pretrained weights; fetch those that are missing, or take files from hand."""
    for file in options.files:
        print(f"{file}: good, now {api.adopt_weights(file)}.")
    print(f"Pretrained weights in {api.weights_folder()}:")
    problems = []
    for file in api.weights(fetch=not options.files):  # a user who brings files has no connection
        print(f"  {file.backbone:15} {file.name:38} {file.state}")
        problems += [file.problem] if file.problem else []
    for problem in problems:
        print(f"hpo: {problem}", file=sys.stderr)
    return 1 if problems else 0
