"""What the tests ask the model for: small enough that a small model reaches the end of it."""

from pydantic import BaseModel, ConfigDict, Field

CITIES = ("Bern", "Oslo")
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Today's weather in a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": list(CITIES)}, "days": {"type": "integer", "minimum": 1, "maximum": 7}},
            "required": ["city", "days"],
            "additionalProperties": False,
        },
        "strict": True,
    },
}


class Person(BaseModel):
    # Without this the schema lets the model add what it likes, and a small one does not stop.
    model_config = ConfigDict(extra="forbid")
    name: str = Field(min_length=1, max_length=12)
    age: int = Field(ge=0, le=130)
