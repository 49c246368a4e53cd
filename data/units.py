"""What may stand after the number of an answer: its unit, and nothing else.

    72 clips, 5 km, 60 miles per hour        units
    5 million, 72 is wrong, 72 or so         not: they change the number, or take it back

The words of a unit are words of the question, its usual short forms (km for kilometers), or a word
such as "total". A closed list of words is no part of any unit, wherever it stands: words that are
numbers, negations, alternatives, verbs. A list of what is forbidden would always lack a word that
a model finds. The question's own words cannot say much that is new.
"""
import functools
import re

LETTERS = "[a-zA-Zà-öø-ÿ]"
SHAPE = re.compile(rf"(?:{LETTERS}|(?<={LETTERS})(?:[-/](?={LETTERS})|\^?[²³]|\^\{{?[23]\}}?)"
                   r"|\.(?!\.)|\s|(?<!%)\\?%|[°€£¢])*")
WORD = re.compile(rf"{LETTERS}+|[%°$€£¢²³]|\^\{{?[23](?![0-9])")
MULTIPLIER = re.compile(r"(?<![a-zA-Z])[KMBT](?![a-zA-Z])")                 # 5M, 5K

# Names of one thing, of which the question has one and the answer may have another
NAMES = [frozenset(names.split()) for names in """
    $ dollar usd buck; € euro eur; £ pound gbp lb; ¢ cent; % percent percentage pct;
    ° degree deg celsius fahrenheit circ; square sq ² ^2 area surface; cubic cu ³ ^3 volume;
    mile mi mph; kilometer kilometre km kmh kph; meter metre m; centimeter centimetre cm;
    millimeter mm; foot feet ft; inch; yard yd; kilogram kilo kg; gram gm g; milligram mg;
    ounce oz; ton tonne; liter litre l; milliliter ml; gallon gal; second sec; minute min;
    hour hr h; day daily; week weekly wk; month monthly;
    year yearly yr old older age aged annual annually; child children kid; man men;
    woman women; person people""".split(";")]
SMALL = frozenset("a an the of in per each every all more total altogether overall left".split())
# Numbers; negations; alternatives; doubts; verbs
NEVER = frozenset("""
    zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen
    fifteen sixteen seventeen eighteen nineteen twenty thirty forty fifty sixty seventy eighty
    ninety hundred thousand million billion trillion quadrillion lakh crore dozen score gross
    myriad k bn mn mln mio half halves third quarter fourth fifth sixth eighth tenth hundredth
    thousandth twice thrice double triple squared cubed plus minus negative x over under below
    above
    not no non never none nor neither cannot wrong incorrect false untrue nope without except
    but
    or and to versus vs either both maybe perhaps possibly probably through between until
    instead otherwise then if unless than
    about approx approximately around roughly nearly almost so ish circa at least most up
    is was are were be been am pm do does did will would should could might must has have had
    equal""".split())


def forms(word):
    """A word and what it may be the plural of: boxes, boxe, box."""
    return {word, word.removesuffix("s"), word.removesuffix("es"), re.sub("ies$", "y", word)}


def words(text):
    text = re.sub(r"\b([a-zA-Z])\.(?=[a-zA-Z]\b)", r"\1", text)                         # p.m.
    return [w.replace("{", "") for w in WORD.findall(text.lower())]


@functools.lru_cache(1024)
def known(question):
    """All words that may be a unit's if this is the question. Signs in it are no names: one with
    "20% off" asks for dollars, and only the word percent lets an answer have its sign."""
    said = set().union(*map(forms, words(question))) - {"%", "^2", "^3"}
    return said.union(SMALL, *(names for names in NAMES if names & said))


def is_unit(text, question=""):
    """Whether this is the unit of a number in the answer to this question, or nothing at all. Of
    an unknown question any word is taken that is not in NEVER."""
    if not SHAPE.fullmatch(text) or MULTIPLIER.search(text):
        return False
    said = [forms(word) for word in words(text)]
    if NEVER & set().union(*said):
        return False
    return not words(question) or all(word & known(question) for word in said)
