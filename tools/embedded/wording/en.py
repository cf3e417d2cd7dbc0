"""English."""

import re

from tools.embedded.wording.wording import Wording, joiner

_WITH_ARTICLE = re.compile(
    r"Islands?$|Territor(y|ies)$|Republic$|^United |^Bahamas|^Gambia$|^Maldives|^Netherlands|^Philippines|^Comoros"
    r"|^Isle of|Netherlands$|Emirates$"
)
_NO_ARTICLE = re.compile(r"^(Norfolk|Christmas|Ascension) Island$")


def _territory(name: str) -> str:
    return f"the {name}" if _WITH_ARTICLE.search(name) and not _NO_ARTICLE.search(name) else name


_UNITS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
).split()
_TENS = "- - twenty thirty forty fifty sixty seventy eighty ninety".split()


def _in_words(figures: str) -> str:
    """76 -> seventy-six: who asks need not write a number as the document does."""
    number = int(figures)
    if number < len(_UNITS):
        return _UNITS[number]
    tens, units = divmod(number, 10)
    return f"{_TENS[tens]}-{_UNITS[units]}" if units else _TENS[tens]


def _finish(text: str) -> str:
    return text[:1].upper() + text[1:]


SENTENCES = {
    "money": (
        "Prices in {S} are quoted in {money}, which is legal tender.",
        "The currency of {S} is {money}.",
        "The legal tender of {S} is {money}.",
        "Bills in {S} are settled in {money}.",
    ),
    "moneys": (
        "Two currencies are legal tender in {S}: {money}.",
        "In {S}, {money} circulate side by side as legal tender.",
    ),
    "official": (
        "{langs} is the official language of {S}.",
        "The one language with official standing in {S} is {langs}.",
        "Public offices in {S} work in {langs}, the official language.",
    ),
    "officials": (
        "The official languages of {S} are {langs}.",
        "{langs} share official standing in {S}.",
        "Public offices in {S} work in several official languages: {langs}.",
    ),
    "share": (
        "CLDR estimates that {L} is used by about {p}% of the people in {S}.",
        "In {S}, an estimated {p}% of the inhabitants use {L}.",
        "By CLDR's estimate, users of {L} make up about {p}% of the population of {S}.",
    ),
    "shares": (
        "CLDR estimates that in {S} about {p}% of the people use {L} and about {p2}% use {L2}.",
        "In {S}, an estimated {p}% of the inhabitants use {L}, while {L2} is used by some {p2}%.",
        "By CLDR's estimate, {L} reaches about {p}% of the population of {S}, and {L2} about {p2}%.",
    ),
    "city": (
        "The time zone of {S} is named after {cities}.",
        "In the tz database, the clocks of {S} are listed under {cities}.",
        "{cities} gives its name to the single time zone of {S}.",
    ),
    "cities": (
        "The time zones of {S} include those named after {cities}.",
        "Several time zones cover {S}, among them the ones of {cities}.",
        "In the tz database, the clocks of {S} are listed under {cities}, among other places.",
    ),
    "clock": (
        "Clocks in {S} show {clock}.",
        "The hour kept throughout {S} is called {clock}.",
        "{S} lives by {clock}.",
    ),
    "week": (
        "Calendars printed in {S} begin the week on {day}.",
        "In {S}, the first day of the week is {day}.",
        "The week in {S} starts on {day}.",
    ),
    "code": (
        "The ISO 4217 code of {S} is {code}.",
        "In exchange tables {S} appears under the code {code}.",
        "Banks abbreviate {S} as {code}.",
    ),
    "place": (
        "CLDR lists {S} as legal tender in one territory: {places}.",
        "People in {places} pay with {S}.",
        "{S} is legal tender in {places}.",
    ),
    "places": (
        "{S} is legal tender in {places}.",
        "People pay with {S} in {places}.",
        "By law, {S} is accepted in {places}.",
    ),
    "some_places": (
        "{S} is legal tender in a number of territories, among them {places}.",
        "Several territories share {S}, for example {places}.",
        "People in {places}, and in other territories too, pay with {S}.",
    ),
    "digits": (
        "Amounts in {S} are written with {number} decimal places.",
        "CLDR gives {S} {number} digits after the decimal point.",
        "A price in {S} has {number} decimals.",
    ),
    "no_digits": (
        "CLDR writes amounts in {S} without any decimals.",
        "Sums in {S} are normally shown as whole numbers, with {number} decimal places.",
        "By CLDR's rules, prices in {S} have no digits after the decimal point.",
    ),
    "since": (
        "{S} has been legal tender since {year}.",
        "According to CLDR, {S} came into use in {year}.",
        "The history of {S} as legal tender goes back to {year}.",
    ),
    "script": (
        "Texts in {S} are mostly written in the {script} script.",
        "The usual script of {S} is {script}.",
        "To read {S} one normally needs the {script} script.",
    ),
    "official_in": (
        "{S} has official standing in {places}.",
        "The official use of {S} is recorded for {places}.",
        "{S} is an official language of {places}.",
    ),
    "official_in_some": (
        "Among the territories where {S} is official are {places}.",
        "{S} has official standing in several territories, {places} among them.",
        "The official use of {S} is recorded, for example, for {places}.",
    ),
    "most": (
        "Nowhere does CLDR put the share of people who use {S} higher than in {places}, at about {number}%.",
        "{S} has its largest share of users in {places}, by CLDR's estimate {number}% of the people.",
        "By share of the population {S} is strongest in {places}, where an estimated {number}% use it.",
    ),
    "autonym": (
        "Its own name for {S} is “{word}”.",
        "In its own words, {S} is called “{word}”.",
        "Those who use {S} call it “{word}”.",
    ),
    "monday": (
        "The word for Monday in {S} is “{word}”.",
        "Monday is “{word}” in {S}.",
        "In {S} the week's Monday is called “{word}”.",
    ),
    "plural": (
        "Where numbers meet nouns, {S} distinguishes {number} plural categories.",
        "CLDR counts {number} plural categories in {S}.",
        "The grammar of {S} has {number} plural categories in CLDR.",
    ),
}

QUESTIONS = {
    "money_of": (
        "What money do people pay with in {T}?",
        "Which banknotes does a traveller to {T} need?",
        "What is the currency of {T}?",
        "In what currency are wages paid in {T}?",
    ),
    "official_of": (
        "What is the official language of {T}?",
        "In which language does the government of {T} publish its laws?",
        "Which language has official status in {T}?",
    ),
    "share_of": (
        "What part of the population of {T} uses {L}?",
        "How many people out of a hundred use {L} in {T}?",
        "How widespread is {L} in {T}?",
    ),
    "language_by_share": (
        "Which language do about {p} percent of the people in {T} use?",
        "What is the language that reaches {p} percent of the inhabitants of {T}?",
        "{p} out of a hundred people in {T} use one language: which?",
    ),
    "city_of": (
        "After which place is the time zone of {T} named?",
        "Which place does the tz database use for the hour in {T}?",
        "Setting a watch for {T}: which town do I pick from the list?",
    ),
    "clock_of": (
        "What is the time kept in {T} called?",
        "By which time do people in {T} set their clocks?",
        "Under what name is the local time of {T} known?",
    ),
    "week_of": (
        "On which day does the week start in {T}?",
        "What weekday stands in the first column of a calendar from {T}?",
        "Which day opens the week in {T}?",
    ),
    "by_money_official": (
        "Where is {L} official and {c} the money in use?",
        "Which place pays with {c} and has {L} as an official language?",
        "I paid with {c} and all the official signs were in {L}: where was I?",
    ),
    "by_money_share": (
        "Where do roughly {p} percent of the people use {L} and everybody pays with {c}?",
        "Which territory spends {c} while {L} is used by {p} percent of it?",
        "Shops take {c} and {p} in a hundred inhabitants use {L}: which place is it?",
    ),
    "by_money_clock": (
        "Which territory pays with {c} and lives by {clock}?",
        "Where does one spend {c} while the watch shows {clock}?",
        "Name the place with {clock} on its clocks and {c} in its purses.",
    ),
    "by_city_official": (
        "Which territory has the time of {city} and {L} as an official language?",
        "Where is {L} official, with {city} as a reference for the clocks?",
        "To which country or territory does the time zone {city} belong, {L} being official there?",
    ),
    "by_city_week": (
        "Where is the clock set by {city} and the week begun on {day}?",
        "Which territory uses the {city} time zone and has {day} as the first day of its week?",
        "A calendar that opens with {day}, a watch set to {city}: where is that?",
    ),
    "by_official_clock": (
        "Where is {L} official and {clock} observed?",
        "Which territory keeps {clock} and runs its offices in {L}?",
        "{clock} on the wall and {L} in the law: what place is this?",
    ),
    "by_shares": (
        "Where is {L} used by {p} percent of the people and {L2} by {p2} percent?",
        "In which territory do {p} out of a hundred use {L}, and {p2} out of a hundred {L2}?",
        "Which population uses {L} ({p} percent) and {L2} ({p2} percent)?",
    ),
    "money_by_code": (
        "What money hides behind the letters {code}?",
        "Which currency is meant by {code}?",
        "My bank statement says {code}: what currency is that?",
    ),
    "code_of_money": (
        "How is {c} abbreviated by banks?",
        "What three letters stand for {c}?",
        "Under which ISO code is {c} traded?",
    ),
    "where_money": (
        "Where can I spend {c}?",
        "Which territory's money is {c}?",
        "In what place do shops accept {c}?",
    ),
    "code_in": (
        "What is the three-letter code of the money of {T}?",
        "How does ISO abbreviate the currency used in {T}?",
        "Which currency code do I enter for a transfer to {T}?",
    ),
    "digits_in": (
        "How many decimals does a price in {T} have?",
        "With how many digits after the point is the money of {T} written?",
        "Does one write fractions in amounts of the currency of {T}?",
    ),
    "digits_of": (
        "How many decimal places does {c} have?",
        "Is a sum in {c} written with decimals?",
        "With how many digits after the point does one write {c}?",
    ),
    "since_when": (
        "Since when has {c} been in circulation?",
        "In what year was {c} introduced?",
        "How old is {c} as a means of payment?",
    ),
    "language_by_autonym": (
        "Which language calls itself “{word}”?",
        "What do we call the language known to its own users as {word}?",
        "“{word}” is a language's own name: which language is it?",
    ),
    "language_by_monday": (
        "In which language is the day after Sunday called “{word}”?",
        "“{word}” means Monday in what language?",
        "What language has the weekday “{word}” for Monday?",
    ),
    "script_of": (
        "Which alphabet or script is {L} written in?",
        "What letters do I have to learn to read {L}?",
        "How is {L} put on paper: in which writing system?",
    ),
    "plural_of": (
        "How many plural forms does a translator into {L} have to provide?",
        "How many number categories are there in {L}?",
        "Into how many plural classes does {L} sort its numbers?",
    ),
    "monday_of": (
        "How does one say Monday in {L}?",
        "What is the first working day of the week called in {L}?",
        "What is the name of the day after Sunday in {L}?",
    ),
    "most_of": (
        "Where in the world is {L} most widespread?",
        "In which territory does the greatest share of people use {L}?",
        "What place has proportionally the most users of {L}?",
    ),
    "where_official": (
        "Where does {L} have official status?",
        "Which territory has made {L} its official language?",
        "In what country or territory are laws published in {L}?",
    ),
    "by_share_clock": (
        "Where does the clock show {clock} while {p} percent of the people use {L}?",
        "Which territory keeps {clock} and has {p} users of {L} in every hundred inhabitants?",
        "{clock} on every wall, {L} for {p} people out of a hundred: what place is this?",
    ),
    "by_share_week": (
        "Where does the week open with {day} and {L} reach {p} percent of the people?",
        "{p} out of a hundred use {L} and calendars begin with {day}: where is that?",
        "In which territory is {day} the first weekday and {L} used by {p} percent?",
    ),
    "since_in": (
        "In what year did the money of {T} come into use?",
        "Since when do people in {T} have the currency they pay with?",
        "How old is the currency of {T}?",
    ),
    "script_in": (
        "What kind of letters is the official language of {T} written in?",
        "Which writing system does one need to read the laws of {T}?",
        "In what script are official papers in {T} written?",
    ),
    "plural_in": (
        "How many plural categories does the official language of {T} have?",
        "Translating software for {T}: how many plural forms does its official language need?",
        "Into how many number classes does the official language of {T} fall?",
    ),
    "monday_in": (
        "What is Monday called in the official language of {T}?",
        "Which word for the day after Sunday do officials in {T} write?",
        "How does an office in {T} write Monday in the language of the state?",
    ),
    "autonym_in": (
        "What do people in {T} call their official language in that language?",
        "By what name does the official language of {T} go among those who use it?",
        "How is the name of the official language of {T} written in that language?",
    ),
}

WORDING = Wording(
    sentences=SENTENCES,
    questions=QUESTIONS,
    pronouns={
        "territory": ("the territory", "this territory", "this place"),
        "currency": ("the currency", "this currency", "this money"),
        "language": ("the language", "this language"),
    },
    titles={"territory": "{S}", "currency": "{S}", "language": "{S} language"},
    join=joiner(", ", " and "),
    territory=_territory,
    currency=lambda name: f"the {name}",
    number_asked=_in_words,
    finish=_finish,
    identifiers=False,
)
