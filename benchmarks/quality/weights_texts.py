"""Texts that weights_accuracy measures with, written for it: prose, and statements with a known last word."""

PROSE = """\
The old ferry had crossed the strait every morning for sixty years, and most of the people who lived on the \
island could not remember a time without it. When the company announced that a bridge would be built, the \
newspaper on the mainland called it progress. On the island the news was received more quietly. The baker said \
that flour would be cheaper. The doctor said that she would no longer have to wait for the tide when somebody \
broke a leg. The children wanted to know whether it would be possible to walk across, and how long that would \
take.

Building began in the spring. First came the surveyors, with their tripods and their orange jackets, who \
measured the shore from the lighthouse to the harbour wall. Then came the barges with the cranes. For two \
summers there was the sound of hammers over the water, and in the evenings the workers sat in front of the inn \
and told stories about other bridges, in other countries, which had all been longer and more difficult. One of \
them had worked in the desert, where the steel became so hot during the day that nobody could touch it, and they \
had worked at night, under lamps.

The captain of the ferry watched all of this from his wheelhouse. He was a careful man who did not say much. He \
had learned the trade from his father, and he knew every rock and every current between the two harbours. In fog \
he used to switch off the engine for a moment and listen. People asked him what he was going to do when the \
bridge was finished. He answered that he had not decided yet, and that there was still a lot of painting to be \
done before the winter.

A bridge of this kind stands on pillars that are driven deep into the ground, because the upper layers of sand \
move with the waves. The engineers had to find out how deep the rock was. They drilled small holes along the \
line of the bridge, took samples out of each of them and wrote down what they found: sand, clay, gravel, and \
finally stone. From these numbers a computer calculated how much weight each pillar could carry. In one place \
the rock was missing altogether, and the plan had to be changed. The road now makes a gentle curve there, which \
most drivers never notice.

On the last day of the ferry almost everybody came to the harbour. There was music, and the mayor made a speech \
that was much too long. The captain shook hands with all passengers, as he had always done, and took the boat \
out for the last time. Halfway across he switched off the engine. It was a clear day, and there was no need for \
it, but the people on board understood and became quiet. They could hear the water against the hull, the gulls, \
and far away the first cars on the bridge."""

STATEMENTS = (
    ("The capital of France is", "Paris", "London", "Berlin", "Rome"),
    ("The capital of Italy is", "Rome", "Paris", "Madrid", "Vienna"),
    ("The capital of Japan is", "Tokyo", "Beijing", "Seoul", "Bangkok"),
    ("The capital of Germany is", "Berlin", "Paris", "Rome", "London"),
    ("The largest planet in our solar system is", "Jupiter", "Mars", "Venus", "Earth"),
    ("The planet closest to the Sun is", "Mercury", "Jupiter", "Neptune", "Mars"),
    ("Water is made of hydrogen and", "oxygen", "carbon", "iron", "gold"),
    ("The opposite of hot is", "cold", "warm", "fast", "tall"),
    ("The opposite of up is", "down", "left", "big", "new"),
    ("A baby cat is called a", "kitten", "puppy", "calf", "foal"),
    ("A baby dog is called a", "puppy", "kitten", "lamb", "calf"),
    ("The color of the sky on a clear day is", "blue", "green", "red", "brown"),
    ("The color of grass is", "green", "blue", "red", "black"),
    ("Bananas are usually", "yellow", "blue", "purple", "black"),
    ("There are seven days in a", "week", "month", "year", "hour"),
    ("There are sixty minutes in an", "hour", "year", "month", "week"),
    ("The day after Monday is", "Tuesday", "Sunday", "Friday", "Thursday"),
    ("The month after January is", "February", "March", "December", "June"),
    ("Two plus two equals", "four", "three", "seven", "nine"),
    ("The number after nine is", "ten", "two", "five", "eight"),
    ("Bees make", "honey", "milk", "bread", "wine"),
    ("Cows give us", "milk", "honey", "eggs", "silk"),
    ("Fish live in", "water", "trees", "fire", "houses"),
    ("Birds can", "fly", "read", "drive", "write"),
    ("The currency of the United States is the", "dollar", "euro", "pound", "yen"),
    ("The author of Romeo and Juliet is William", "Shakespeare", "Wordsworth", "Faulkner", "Blake"),
    ("The first president of the United States was George", "Washington", "Lincoln", "Jefferson", "Adams"),
    ("The largest ocean on Earth is the", "Pacific", "Atlantic", "Indian", "Arctic"),
    ("Ice is frozen", "water", "milk", "air", "sand"),
    ("People use their eyes to", "see", "hear", "smell", "walk"),
    ("People use their ears to", "hear", "see", "eat", "walk"),
    ("The heart pumps", "blood", "air", "water", "food"),
)
"""A statement without its last word, the right one, and wrong ones."""
