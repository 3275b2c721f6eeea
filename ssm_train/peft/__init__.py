"""PEFT methods. Importing this package teaches Hugging Face PEFT the adapter type SSM_LORA, so that
`PeftModel.from_pretrained(model, directory)` loads adapters that stock PEFT would refuse or kill.
"""

from ssm_train.peft.registration import SsmLoraConfig, SsmLoraModel, register

register()

__all__ = ["SsmLoraConfig", "SsmLoraModel"]
