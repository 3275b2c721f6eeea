"""DART: triples (subject, relation, object) to sentences; several references a record.

Nan et al. 2021, https://aclanthology.org/2021.naacl-main.37. Fields tripleset, annotations.
"""

from ssm_train.data.tasks.text import GenerationTask

DART = GenerationTask(
    type="generation",
    prompt="facts : {tripleset} \ndescription :",
    label=" {annotations}",
    metrics=["bleu", "rougeL", "exact_match"],
)
