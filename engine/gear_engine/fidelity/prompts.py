"""Prompts for free-running: each is longer than a page and breaks off where there is more to say.

Fixed for good: a change makes figures of before and after incomparable.
"""

_STORY = """The lighthouse keeper had not spoken to anyone for eleven days when the boat came round the headland. He \
saw it first as a dark mark between two waves, then as a mast, then as three people who sat very still and did not \
row. He put down the can of oil, wiped his hands on his trousers, and went down the hundred and forty steps without \
counting them, which he had never done before. The tide was going out. Where the path ended he stood on the wet \
stones and waited, and the boat came on by itself, turning slowly, until it touched the sand. The oldest of the \
three, a woman in a green coat, lifted her head and looked at him as if she had been expecting somebody else. "You \
are late," she said. "We put the letter into the bottle in March." He told her that he had found no bottle and no \
letter, only driftwood and the usual nets. She nodded, as though that explained everything, and then she began to \
tell him what had been in the letter. It said that"""

_EXPLANATION = """How does a refrigerator keep food cold? People often think that it makes cold and puts it inside, \
but there is no such thing as making cold: a refrigerator takes heat out of the box and gives it to the kitchen. It \
needs four parts for this. The compressor squeezes a gas, the refrigerant, so that it becomes hot and dense. The \
condenser, which is the black grid at the back, lets that hot gas give its heat to the air of the room, until the \
gas turns into a liquid. The expansion valve is a narrow opening behind which the pressure is much lower. And the \
evaporator, inside the box, is where the liquid boils at a low temperature and takes up heat from the food around \
it. Then the gas goes back to the compressor and everything starts again. A thermostat switches the compressor on \
and off. Let us now follow one gram of refrigerant on its way round and look at each of the four parts more closely, \
with typical temperatures and pressures.

1. The compressor."""

_CODE = '''"""A small inventory for a shop: items, quantities and prices, kept in memory and saved as JSON."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass
class Item:
    """Something that is sold. The price is in cents, so that sums are exact."""

    name: str
    quantity: int
    price: int


class Inventory:
    """All items by name."""

    def __init__(self) -> None:
        self.items: dict[str, Item] = {}

    def add(self, name: str, quantity: int, price: int) -> None:
        """Put items on the shelf; the price of what is there already changes with it."""
        if quantity <= 0:
            raise ValueError(f"quantity must be positive, got {quantity}")
        if name in self.items:
            self.items[name].quantity += quantity
            self.items[name].price = price
        else:
            self.items[name] = Item(name, quantity, price)

    def remove(self, name: str, quantity: int) -> None:
        """Take items from the shelf. Raises KeyError or ValueError if there are not so many."""
'''

_SUMS = """A bakery sells bread at 4 dollars, cakes at 18 dollars and rolls at 1 dollar each. On Monday it sold 35 \
loaves of bread, 6 cakes and 120 rolls.

Question: How much did the bakery take on Monday?
Answer: Bread brought 35 * 4 = 140 dollars. Cakes brought 6 * 18 = 108 dollars. Rolls brought 120 * 1 = 120 dollars. \
Together that is 140 + 108 + 120 = 368 dollars.

Question: On Tuesday it sold twice as many loaves and half as many cakes as on Monday, and the same number of rolls. \
How much did it take on Tuesday?
Answer: Bread brought 70 * 4 = 280 dollars. Cakes brought 3 * 18 = 54 dollars. Rolls brought 120 dollars again. \
Together that is 280 + 54 + 120 = 454 dollars.

Question: On Wednesday it sold 10 loaves fewer than on Tuesday, 5 cakes, and 30 rolls more than on Monday. How much \
did it take on Wednesday, and on all three days together?
Answer:"""

_DIALOGUE = """Interviewer: Professor Lindqvist, you have studied the migration of birds for thirty years. What made \
you begin?

Lindqvist: A mistake, really. I was to count ducks for a summer, and I counted the wrong lake. Nobody had ever \
written down what lived on that one, so my mistake became my thesis.

Interviewer: And what is the question that you would still like to see answered?

Lindqvist: How a young cuckoo knows where to go. Its parents left weeks before. It was raised by other birds, which \
stay here or go somewhere else. It flies alone, at night, over land that it has never seen, to a forest in Africa, \
and it arrives. We know that there is something like a compass. We do not know where the map is.

Interviewer: There are critics who say that tracking devices disturb the very birds that you want to understand. How \
do you answer them?

Lindqvist: They are right to ask. The first devices that we used"""

_REPORT = """City council of Harrowgate, minutes of the meeting of 14 May

Present: Mayor A. Okafor (chair), councillors B. Reyes, C. Whitfield, D. Marsh, E. Nakamura, F. Dubois; the city \
engineer, G. Petrov. Absent with apologies: councillor H. Lund.

1. The minutes of the meeting of 16 April were approved without changes.

2. Bridge over the Arrow. The city engineer reported that two of the six bearings of the bridge are worn and that \
the weight limit of 12 tonnes has to stay until they are replaced. Three firms have made offers, of 410,000, 385,000 \
and 452,000. Councillor Whitfield asked whether buses could cross in the meantime. The engineer answered that empty \
buses could and full ones could not. It was agreed to accept the second offer and to begin in July.

3. Public library. Councillor Dubois proposed to open the library on Sundays from October on. The cost would be \
38,000 a year. Councillor Marsh was in favour, but wanted the money to come from"""

PROMPTS = (_STORY, _EXPLANATION, _CODE, _SUMS, _DIALOGUE, _REPORT)
