"""Records of evaluation tasks in local files (`tools/evaluate.py --data`).

Of each task the fields that lm-evaluation-harness's task reads ("hub"), and where there is one a plainer form that is
turned into them: choices as a list, and the right one counted from 0 in `gold`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, StringConstraints, TypeAdapter, model_validator

from hola_megatron.files.schema_types import Count, Schema

Text = Annotated[str, StringConstraints(min_length=1)]
Texts = Annotated[list[str], Field(min_length=2, max_length=26)]


class Labelled(Schema):
    """Choices as the hub's ARC, OpenBookQA and CommonsenseQA have them."""

    text: Texts
    label: Annotated[list[str], Field(min_length=2)]


class LabelledQuestion(Schema):
    choices: Labelled
    answerKey: str

    @model_validator(mode="after")
    def _answered(self) -> Self:
        if self.answerKey.strip() not in self.choices.label or len(self.choices.label) != len(self.choices.text):
            raise ValueError(f"answerKey {self.answerKey!r} is no label, or labels and texts differ in number")
        return self


class Question(LabelledQuestion):
    question: Text


class Stem(LabelledQuestion):
    question_stem: Text


class Gold(Schema):
    choices: Texts
    gold: Count

    @model_validator(mode="after")
    def _answered(self) -> Self:
        if self.gold >= len(self.choices):
            raise ValueError(f"gold is {self.gold}, and there are {len(self.choices)} choices, counted from 0")
        return self


class PlainQuestion(Gold):
    question: Text


class PlainFive(PlainQuestion):
    choices: Annotated[list[str], Field(min_length=5, max_length=5)]


class HellaSwag(Schema):
    activity_label: str
    ctx_a: str
    ctx_b: str
    endings: Annotated[list[str], Field(min_length=4, max_length=4)]
    label: Annotated[str, StringConstraints(pattern=r"^[0-3]$")]


class PlainHellaSwag(Gold):
    choices: Annotated[list[str], Field(min_length=4, max_length=4)]
    query: Annotated[str, StringConstraints(pattern=r": ")]


class Piqa(Schema):
    goal: Text
    sol1: str
    sol2: str
    label: Literal[0, 1]


class PlainPiqa(Gold):
    choices: Annotated[list[str], Field(min_length=2, max_length=2)]
    goal: Text


class WinoGrande(Schema):
    sentence: Annotated[str, StringConstraints(pattern=r"_")]
    option1: Text
    option2: Text
    answer: Literal["1", "2"]


class PlainWinoGrande(WinoGrande):
    answer: Literal[1, 2]  # type: ignore[assignment]


class BoolQ(Schema):
    passage: Text
    question: Text
    label: Literal[0, 1]


class PlainBoolQ(Schema):
    passage: Text
    question: Text
    answer: Literal["yes", "no"]


class SciQ(Schema):
    support: str
    question: Text
    distractor1: str
    distractor2: str
    distractor3: str
    correct_answer: str


class SocialIqa(Schema):
    context: Text
    question: Text
    answerA: str
    answerB: str
    answerC: str
    label: Literal["1", "2", "3"]


class PlainSocialIqa(Gold):
    choices: Annotated[list[str], Field(min_length=3, max_length=3)]
    context: Text
    question: Text


class Lambada(Schema):
    text: Annotated[str, StringConstraints(pattern=r" ")]


class PlainLambada(Schema):
    context: Text
    continuation: Text


class Page(Schema):
    page: Text


class Completion(Schema):
    """FDA, SWDE and SQuAD completion: a text whose continuation is to contain `value`."""

    text: Text
    value: Text


class Drop(Schema):
    passage: Text
    question: Text
    query_id: str
    answer: dict[str, Any]
    validated_answers: dict[str, Any]


class PlainDrop(Schema):
    passage: Text
    question: Text
    answers: Annotated[list[Annotated[list[str], Field(min_length=1)]], Field(min_length=1)]


def _forms(*kinds: type[Schema]) -> dict[str, TypeAdapter[Any]]:
    return dict(zip(("hub", "plain"), map(TypeAdapter, kinds), strict=False))


RECORDS: dict[str, dict[str, TypeAdapter[Any]]] = {
    "arc_easy": _forms(Question, PlainQuestion), "arc_challenge": _forms(Question, PlainQuestion),
    "boolq": _forms(BoolQ, PlainBoolQ), "commonsense_qa": _forms(Question, PlainFive),
    "drop": _forms(Drop, PlainDrop), "fda": _forms(Completion), "hellaswag": _forms(HellaSwag, PlainHellaSwag),
    "lambada_openai": _forms(Lambada, PlainLambada), "openbookqa": _forms(Stem, PlainQuestion),
    "piqa": _forms(Piqa, PlainPiqa), "sciq": _forms(SciQ), "social_iqa": _forms(SocialIqa, PlainSocialIqa),
    "squad_completion": _forms(Completion), "swde": _forms(Completion), "wikitext": _forms(Page),
    "winogrande": _forms(WinoGrande, PlainWinoGrande)}
ANY_RECORD = TypeAdapter(dict[str, Any])
