"""Generated dialogues for skills that must work on unseen names, numbers and sentences: remembering, extracting, counting.

Unusual here: what counts is the slots, not the sentences. A name, a pair of numbers or a set of attributes belongs to training or
to evaluation by its hash (`is_heldout`), so a held-out dialogue asks for something that training cannot have shown. Everything
comes from the given random generator; the same state gives the same dialogue.
"""

import hashlib
import json
import random
import re
from collections.abc import Callable, Sequence

from pretraining.corpus import Dialogue, Turn, any_word

HELDOUT_IN = 10  # one slot combination in ten is kept for evaluation
SPLITS = ("train", "heldout")
MADE_UP_SHARE = 0.4  # of the dialogues of these groups
MADE_UP_GROUPS = {"memory", "extract", "reading", "list", "unknown"}

# --- Words ------------------------------------------------------------------------------------------------------------

ZH_SURNAMES = list(
    "王李张刘陈杨黄赵吴周徐孙马朱胡郭何高林罗郑梁谢宋唐许韩冯邓曹彭曾肖田董袁潘于蒋蔡余杜叶程苏魏吕丁任沈姚卢姜崔钟谭陆汪范金石"
    "廖贾夏韦付方白邹孟熊秦邱江尹薛闫段雷侯龙史陶黎贺顾毛郝龚邵万钱严"
)
ZH_SURNAMES += ["欧阳", "司马", "上官", "诸葛"]
ZH_GIVEN = list(
    "伟芳娜秀英敏静丽强磊军洋勇艳杰娟涛明超霞平刚桂兰玲华红建文辉力玉萍鑫宇浩晨梓轩涵怡欣诗雨佳琪雪梅婷凯俊峰思远子墨安然乐瑶"
    "若曦博睿泽楠航宁越晓东海燕春晴云帆志国庆立新亮天嘉豪瑞可心语晗清悦星月心妍彤睿雅慧莹倩薇莉珊珍莎菲岚松柏林森川"
)
ZH_NICKNAMES = [
    prefix + char for prefix in "小阿老大" for char in "明红刚华丽强军芳兰东海云龙宝杰文亮安乐雨雪林王李张陈周吴"
]
EN_NAMES = (
    "Aaron Abby Adam Adele Agnes Aisha Alan Albert Alex Alice Alison Amanda Amber Amy Andrea Andrew Angela Anita Anna Anthony April "
    "Arthur Audrey Barbara Beatrice Bella Ben Betty Bill Bob Brandon Brenda Brian Bruce Calvin Camille Carl Carla Carlos Carmen Carol "
    "Caroline Catherine Cecilia Charles Charlotte Chloe Chris Christine Claire Clara Colin Connor Craig Crystal Cynthia Daisy Dana "
    "Daniel Daphne David Dean Deborah Dennis Derek Diana Diego Donald Donna Dora Doris Dorothy Duncan Dylan Edgar Edith Edward Eileen "
    "Elaine Eleanor Elena Eliza Ella Ellen Elsa Emily Emma Eric Erica Ethan Eva Evelyn Faith Felix Fiona Flora Frances Francis Frank "
    "Fred Gabriel Gary Gavin George Gina Gloria Gordon Grace Graham Greg Hannah Harold Harry Harvey Hazel Heather Helen Henry Holly "
    "Howard Hugo Ian Ida Ingrid Irene Iris Isaac Isabel Ivan Ivy Jack Jacob James Jamie Jane Janet Jasmine Jason Jean Jeff Jenny "
    "Jeremy Jerry Jessica Jill Joan Joe Joel John Jonas Joseph Josh Joyce Juan Judy Julia Julian Karen Karl Kate Keith Kelly Ken "
    "Kevin Kim Kyle Lara Laura Lauren Lea Leo Leon Lewis Lily Linda Lisa Lola Louis Louise Lucas Lucy Luis Luke Lydia Maggie Marcus "
    "Margaret Maria Marie Mark Martha Martin Mary Matt Maya Megan Melissa Mia Michael Miguel Mike Miles Molly Monica Nadia Nancy "
    "Naomi Natalie Nathan Neil Nicole Nina Noah Nora Norman Oliver Olivia Omar Oscar Owen Pamela Patrick Paul Paula Pedro Penny Peter "
    "Philip Phoebe Rachel Ralph Rebecca Rita Robert Robin Roger Ronald Rosa Rose Roy Ruby Russell Ruth Ryan Sally Sam Samantha "
    "Sandra Sara Scott Sean Sharon Sheila Simon Sofia Sophie Stella Stephen Steve Stuart Susan Sylvia Tara Ted Teresa Terry Theo "
    "Thomas Tim Tina Toby Todd Tom Tony Tracy Trevor Valerie Vera Victor Victoria Vincent Violet Wade Walter Wanda Warren Wendy "
    "William Yvonne Zachary Zoe"
).split()
ZH_CITIES = (
    "北京 上海 广州 深圳 杭州 南京 苏州 成都 重庆 武汉 西安 天津 长沙 郑州 青岛 济南 大连 沈阳 哈尔滨 长春 厦门 福州 泉州 昆明 大理 贵阳 "
    "南宁 桂林 海口 三亚 兰州 银川 西宁 拉萨 乌鲁木齐 太原 石家庄 合肥 南昌 宁波 温州 无锡 常州 徐州 扬州 烟台 威海 洛阳 开封 珠海 东莞 佛山 "
    "汕头 绍兴 嘉兴 金华 镇江 南通 株洲 岳阳 襄阳 宜昌 绵阳 丽江 柳州 北海 包头 大同 邯郸 唐山 保定 咸阳 芜湖 黄山 九江 景德镇 赣州 遵义"
).split()
EN_CITIES = (
    "London|Paris|Berlin|Madrid|Rome|Vienna|Prague|Dublin|Lisbon|Oslo|Stockholm|Helsinki|Warsaw|Athens|Amsterdam|Brussels|Zurich|"
    "Geneva|Milan|Venice|Florence|Barcelona|Munich|Hamburg|Lyon|Oxford|Cambridge|Manchester|Liverpool|Leeds|Bristol|York|"
    "Edinburgh|Glasgow|Cardiff|Belfast|New York|Boston|Chicago|Seattle|Denver|Dallas|Houston|Miami|Atlanta|San Francisco|San Diego|"
    "Portland|Phoenix|Toronto|Vancouver|Montreal|Ottawa|Sydney|Melbourne|Brisbane|Perth|Auckland|Wellington|Tokyo|Osaka|Kyoto|Seoul|"
    "Singapore|Bangkok|Hanoi|Manila|Jakarta|Delhi|Mumbai|Cairo|Nairobi|Lagos|Lima|Santiago|Bogota|Havana|Beijing|Shanghai|Hong Kong"
).split("|")
ZH_JOBS = (
    "老师 医生 护士 司机 厨师 画家 律师 会计 警察 记者 程序员 工程师 设计师 摄影师 面包师 理发师 快递员 消防员 农民 木匠 裁缝 翻译 导游 飞行员 "
    "图书管理员 药剂师 音乐老师 健身教练 花店店主 园丁 编辑 演员 电工 售货员 兽医"
).split()
EN_JOBS = (
    "teacher doctor nurse driver cook painter lawyer plumber reporter programmer engineer designer photographer baker hairdresser "
    "firefighter farmer carpenter tailor translator guide pilot librarian pharmacist dentist gardener editor actor electrician waiter "
    "cashier vet mechanic musician sailor"
).split()
ZH_COLOURS = "红色 蓝色 绿色 黄色 紫色 白色 黑色 灰色 粉色 橙色 棕色 米色 天蓝色 墨绿色 金色 银色".split()
EN_COLOURS = "red blue green yellow purple white black grey pink orange brown beige turquoise gold silver".split()
ZH_FRUITS = "苹果 香蕉 橙子 葡萄 西瓜 草莓 桃子 梨 樱桃 芒果 菠萝 荔枝 柚子 猕猴桃 蓝莓 柠檬 石榴 杏子 李子 龙眼 哈密瓜 火龙果".split()
ZH_MEASURES = dict.fromkeys("葡萄 草莓 樱桃 荔枝 蓝莓 龙眼 糖".split(), "颗") | {"铅笔": "支", "本子": "本"}  # else 个
EN_FRUITS = "apples bananas oranges grapes melons strawberries peaches pears cherries mangoes pineapples plums figs lemons blueberries kiwis".split()
ZH_FOODS = (
    "饺子 面条 火锅 烤鸭 米饭 包子 馒头 寿司 汉堡 披萨 红烧肉 麻婆豆腐 番茄炒蛋 酸菜鱼 小笼包 馄饨 炒饭 牛肉面 粽子 汤圆 豆腐 烧烤 煎饼 豆浆 油条"
).split()
EN_FOODS = "pizza|pasta|sushi|soup|salad|dumplings|noodles|rice|tacos|pancakes|burgers|curry|toast|cheese|fish and chips|roast chicken|stew|waffles".split(
    "|"
)
ZH_HOBBIES = "跑步 游泳 画画 唱歌 跳舞 看书 下棋 钓鱼 爬山 摄影 做饭 弹吉他 弹钢琴 打篮球 踢足球 打羽毛球 打乒乓球 骑自行车 养花 写毛笔字 看电影 露营 滑雪 拼图 织毛衣".split()
EN_HOBBIES = (
    "running swimming painting singing dancing reading chess fishing hiking photography cooking basketball football badminton cycling "
    "gardening camping skiing knitting pottery sailing surfing yoga baking drawing climbing"
).split()
ZH_PETS = "小狗 小猫 兔子 仓鼠 鹦鹉 乌龟 金鱼".split()
EN_PETS = "dog cat rabbit hamster parrot turtle goldfish pony".split()
ZH_PET_NAMES = "旺财 豆豆 雪球 布丁 团子 汤圆 奶茶 可乐 米粒 花花 毛毛 点点 圆圆 乐乐 土豆 芝麻 年糕 馒头 糯米 栗子 皮皮 咪咪 黑豆 橘子 泡芙 饼干 虎子 闪电 棉花 葡萄".split()
EN_PET_NAMES = (
    "Max Buddy Luna Coco Milo Rocky Biscuit Pepper Ginger Shadow Snowy Lucky Daisy Oreo Simba Nemo Pickle Waffles Smokey Teddy Ziggy "
    "Button Mocha Peanut Cookie Misty Bruno Sunny Hazel Toffee"
).split()
ZH_THINGS = "钥匙 手机 钱包 雨伞 眼镜 护照 书 帽子 相机 手套 笔记本 车票 耳机 围巾 身份证 充电器".split()
EN_THINGS = "keys|phone|wallet|umbrella|glasses|passport|book|hat|camera|gloves|notebook|ticket|headphones|scarf|charger|watch".split(
    "|"
)
ZH_PLACES = "抽屉里 书架上 沙发上 床底下 门后面 餐桌上 背包里 车里 窗台上 冰箱上面 衣柜里 枕头下面 办公室里 鞋柜上 大衣口袋里 洗衣机上".split()
EN_PLACES = (
    "in the drawer|on the shelf|on the sofa|under the bed|behind the door|on the kitchen table|in my bag|in the car|by the window|"
    "on top of the fridge|in the wardrobe|under the pillow|in the office|in my coat pocket|on the desk|next to the lamp"
).split("|")
ZH_ORGANISATIONS = "晨光书店 蓝天旅行社 市图书馆 第一中学 青松医院 星河科技公司 和平小学 东湖博物馆 阳光超市 云山酒店 万家物业 长风出版社 绿叶餐厅 人民公园 海星游泳馆 新芽幼儿园 飞燕快递 金桥银行 朝阳社区 远航汽车公司".split()
EN_ORGANISATIONS = (
    "Blue Lake Books|Sunrise Travel|City Library|Hillside School|Green Leaf Hospital|Star River Software|Oak Street Bakery|East Museum|"
    "Corner Market|Cloud Hotel|Maple Housing|North Wind Press|Red Door Cafe|Park Theatre|Sea Star Pool|Swift Parcel|Bridge Bank|Harbour Garage"
).split("|")
ZH_GOODS = "台灯 雨伞 书包 水杯 耳机 键盘 毛巾 枕头 帽子 拖鞋 手套 雨衣 风扇 闹钟 相框".split()
EN_GOODS = "lamp umbrella backpack mug keyboard towel pillow hat scarf raincoat fan clock frame kettle tent".split()
ZH_ROOMS = "三楼会议室 一号厅 大礼堂 南门 操场 二楼餐厅 报告厅 活动中心 东门广场 一楼展厅".split()
EN_ROOMS = "the main hall|the library|the south gate|the canteen|the lecture hall|the front desk|the roof garden|the sports field".split(
    "|"
)
ZH_DRINKS = "绿茶 红茶 咖啡 牛奶 豆浆 果汁 可乐 柠檬水".split()
EN_DRINKS = "tea coffee milk juice cocoa lemonade".split()
ZH_INSTRUMENTS = "钢琴 吉他 小提琴 二胡 古筝 笛子 琵琶 架子鼓".split()
EN_INSTRUMENTS = "piano guitar violin cello flute trumpet drums".split()
ZH_LANGUAGES = "英语 日语 法语 德语 韩语 西班牙语 俄语".split()
EN_LANGUAGES = "Spanish French German Japanese Korean Italian Russian".split()
ZH_SEASONS = "春天 夏天 秋天 冬天".split()
EN_SEASONS = "spring summer autumn winter".split()
ZH_ALLERGENS = "花生 牛奶 虾 花粉 芒果 鸡蛋 猫毛".split()
EN_ALLERGENS = "peanuts milk shrimp pollen eggs wheat".split()
ZH_CLUBS = "摄影社 合唱团 象棋社 话剧社 志愿者协会 跑步俱乐部".split()
EN_CLUBS = "the chess club|the choir|the book club|the running group|the drama club".split("|")
ZH_DAYS = [f"星期{day}" for day in "一二三四五六日"]
EN_DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
EN_MONTHS = "January February March April May June July August September October November December".split()
EN_NUMBERS = "zero one two three four five six seven eight nine ten".split()
ZH_RELATIVES = "弟弟 妹妹 哥哥 姐姐 同桌 好朋友 同事 邻居 表弟 堂姐 女儿 儿子 室友".split()
EN_RELATIVES = "brother|sister|best friend|neighbour|cousin|daughter|son|roommate|teacher|colleague|uncle|aunt".split(
    "|"
)
MALE_RELATIVES = set("弟弟 哥哥 表弟 儿子 brother son uncle".split())
FEMALE_RELATIVES = set("妹妹 姐姐 堂姐 女儿 sister daughter aunt".split())
ZH_MALE_GIVEN = set("伟强磊军勇涛杰刚力辉浩俊峰凯博楠航海志国庆豪柏森川东龙")
ZH_FEMALE_GIVEN = set("芳娜秀丽艳娟霞桂兰玲萍怡欣诗琪雪梅婷瑶妍彤雅莹倩薇莉珊珍莎菲岚燕")
EN_UNISEX_NAMES = set("Alex Chris Dana Jamie Jean Kelly Kim Robin Sam Tracy".split())
EN_FEMALE_NAMES = set(
    (
        "Abby Adele Agnes Aisha Alice Alison Amanda Amber Amy Andrea Angela Anita Anna April Audrey Barbara Beatrice Bella Betty "
        "Brenda Camille Carla Carmen Carol Caroline Catherine Cecilia Charlotte Chloe Christine Claire Clara Crystal Cynthia Daisy "
        "Daphne Deborah Diana Dora Doris Dorothy Eileen Elaine Eleanor Elena Eliza Ella Ellen Elsa Emily Emma Erica Eva Evelyn Faith "
        "Fiona Flora Frances Gina Gloria Grace Hannah Hazel Heather Helen Holly Ida Ingrid Irene Iris Isabel Ivy Jane Janet Jasmine "
        "Jenny Jessica Jill Joan Joyce Judy Julia Karen Kate Lara Laura Lauren Lea Lily Linda Lisa Lola Louise Lucy Lydia Maggie "
        "Margaret Maria Marie Martha Mary Maya Megan Melissa Mia Molly Monica Nadia Nancy Naomi Natalie Nicole Nina Nora Pamela Paula "
        "Penny Phoebe Rachel Rebecca Rita Rosa Rose Ruby Ruth Sally Samantha Sandra Sara Sheila Sofia Sophie Stella Susan Sylvia Tara "
        "Teresa Tina Valerie Vera Victoria Violet Wanda Wendy Yvonne Zoe"
    ).split()
)

VOCABULARY = [
    tuple(pair.replace("_", " ").split("="))
    for pair in (
        "苹果=apple 香蕉=banana 葡萄=grape 西瓜=watermelon 草莓=strawberry 桃子=peach 柠檬=lemon 土豆=potato 番茄=tomato 胡萝卜=carrot "
        "洋葱=onion 白菜=cabbage 面包=bread 鸡蛋=egg 牛奶=milk 米饭=rice 面条=noodles 茶=tea 咖啡=coffee 水=water 盐=salt 糖=sugar "
        "猫=cat 狗=dog 鸟=bird 鱼=fish 马=horse 牛=cow 羊=sheep 猪=pig 鸡=chicken 鸭子=duck 兔子=rabbit 老虎=tiger 狮子=lion "
        "大象=elephant 猴子=monkey 熊猫=panda 蛇=snake 蝴蝶=butterfly 蜜蜂=bee 蚂蚁=ant 太阳=sun 月亮=moon 星星=star 天空=sky "
        "云=cloud 雨=rain 雪=snow 风=wind 山=mountain 河=river 海=sea 湖=lake 树=tree 花=flower 草=grass 火=fire 石头=stone "
        "房子=house 门=door 窗户=window 桌子=table 椅子=chair 床=bed 灯=lamp 书=book 笔=pen 纸=paper 包=bag 钥匙=key 手机=mobile_phone "
        "电脑=computer 电视=television 冰箱=fridge 汽车=car 自行车=bicycle 火车=train 飞机=plane 船=ship 公共汽车=bus 学校=school "
        "医院=hospital 银行=bank 商店=shop 公园=park 图书馆=library 饭店=restaurant 机场=airport 车站=station 老师=teacher "
        "学生=student 医生=doctor 护士=nurse 警察=police_officer 厨师=cook 司机=driver 爸爸=father 妈妈=mother 哥哥=older_brother "
        "妹妹=younger_sister 朋友=friend 孩子=child 头=head 手=hand 脚=foot 眼睛=eye 耳朵=ear 鼻子=nose 嘴=mouth 头发=hair 红色=red "
        "蓝色=blue 绿色=green 黄色=yellow 白色=white 黑色=black 春天=spring 夏天=summer 秋天=autumn 冬天=winter 早上=morning "
        "晚上=evening 今天=today 明天=tomorrow 昨天=yesterday 高兴=happy 难过=sad 生气=angry 累=tired 饿=hungry 渴=thirsty 大=big "
        "小=small 高=tall 快=fast 慢=slow 热=hot 冷=cold 新=new 旧=old 好=good 漂亮=beautiful 干净=clean 安静=quiet 跑=run 走=walk "
        "吃=eat 喝=drink 睡觉=sleep 看书=read 唱歌=sing 跳舞=dance 游泳=swim 工作=work 学习=study 帮助=help 谢谢=thank_you 再见=goodbye "
        "梨=pear 橙子=orange 芒果=mango 玉米=corn 豆腐=tofu 黄油=butter 蜂蜜=honey 汤=soup 蛋糕=cake 勺子=spoon 叉子=fork 盘子=plate 杯子=cup "
        "毛巾=towel 肥皂=soap 牙刷=toothbrush 镜子=mirror 枕头=pillow 毯子=blanket 雨伞=umbrella 帽子=hat 裙子=skirt 衬衫=shirt 裤子=trousers "
        "鞋子=shoes 手套=gloves 围巾=scarf 眼镜=glasses 手表=watch 照片=photo 信=letter 报纸=newspaper 词典=dictionary 铅笔=pencil 尺子=ruler "
        "狼=wolf 狐狸=fox 熊=bear 鹿=deer 青蛙=frog 乌龟=turtle 鲸=whale 老鼠=mouse 桥=bridge 路=road 城市=city 村庄=village 岛=island "
        "沙漠=desert 森林=forest 冰=ice 雷=thunder 彩虹=rainbow 地球=earth 音乐=music 电影=film 故事=story 节日=festival 生日=birthday "
        "邻居=neighbour 奶奶=grandmother 叔叔=uncle 农民=farmer 歌手=singer 市场=market 厨房=kitchen 花园=garden 楼梯=stairs 周末=weekend "
        "勇敢=brave 聪明=clever 诚实=honest 有趣=interesting 困难=difficult 容易=easy 便宜=cheap 贵=expensive 忙=busy 空=empty 满=full "
        "轻=light 重=heavy 长=long 短=short 远=far 近=near 买=buy 卖=sell 写=write 听=listen 想=think 笑=laugh 哭=cry 等=wait 开始=begin "
        "忘记=forget 记住=remember 打开=open 关上=close"
    ).split()
]

# Rounds between telling and asking: small talk that names nobody.
ZH_FILLERS = [
    ("今天心情不错", "真好，希望你一整天都开心。"),
    ("给我讲个笑话吧", "数学书为什么总是不开心？因为它有太多问题。"),
    ("你会做什么？", "我可以聊聊天，回答简单的问题，也能写几句短文。"),
    ("推荐一项运动吧", "可以从快走开始，简单又不伤身体。"),
    ("喝水重要吗", "很重要，每天记得多喝几杯水。"),
    ("早睡有什么好处", "早睡能让身体好好休息，第二天更有精神。"),
    ("一年有几个季节？", "一年有春、夏、秋、冬四个季节。"),
    ("谢谢你", "不客气，很高兴能帮到你。"),
    ("西红柿是水果还是蔬菜", "平时做菜把它当蔬菜，从植物学上看它是果实。"),
    ("彩虹有几种颜色？", "彩虹一般说有七种颜色：红、橙、黄、绿、蓝、靛、紫。"),
    ("今天有点累", "辛苦了，休息一会儿，喝杯热水吧。"),
    ("你喜欢音乐吗", "我听不见声音，不过很乐意和你聊音乐。"),
    ("一个星期有几天", "一个星期有七天。"),
    ("怎么记单词", "每天记几个，多读多用，隔几天再复习一遍。"),
    ("天空为什么是蓝色的？", "阳光里的蓝光更容易被空气散射，所以天空看起来是蓝色的。"),
    ("说一句鼓励的话", "慢慢来，每一步都算数。"),
    ("我想学英语", "好主意，可以从每天听十分钟、读一小段开始。"),
    ("牛奶什么时候喝好", "早上或睡前都可以，看自己的习惯。"),
]
EN_FILLERS = [
    ("I am in a good mood today.", "That is nice to hear. I hope it lasts all day."),
    ("Tell me a joke.", "Why was the maths book sad? It had too many problems."),
    ("What can you do?", "I can chat, answer simple questions and write a few lines."),
    ("Is drinking water important?", "Yes. A few glasses a day keep your body working well."),
    ("How many seasons are there?", "There are four: spring, summer, autumn and winter."),
    ("Thank you.", "You are welcome!"),
    ("What colour is the sky?", "On a clear day the sky is blue."),
    ("I am a bit tired.", "Then take a short rest and drink some water."),
    ("How many days are in a week?", "A week has seven days."),
    ("Do you like music?", "I cannot hear it, but I enjoy talking about it."),
    ("Say something kind.", "Small steps count too. You are doing well."),
    ("Which sport is easy to start?", "Walking is easy to start and good for you."),
    ("How can I learn new words?", "Learn a few each day, use them, and repeat them after some days."),
    ("I had a busy morning.", "I hope the afternoon will be calmer."),
    ("What do bees make?", "Bees make honey."),
    ("Is a tomato a fruit?", "Botanically it is a fruit, in the kitchen we use it as a vegetable."),
]

# --- Tools ------------------------------------------------------------------------------------------------------------


def is_heldout(*slots: object) -> bool:
    """True if this combination of slot values belongs to evaluation; the same on every machine and in every run."""
    digest = hashlib.blake2b("|".join(map(str, slots)).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") % HELDOUT_IN == 0


def _draw(rng: random.Random, split: str, sample: Callable[[], tuple]) -> tuple:
    """Slots from sample() that belong to the split."""
    while True:
        slots = sample()
        if is_heldout(*slots) == (split == "heldout"):
            return slots


def _single(topic: str, lang: str, query: str, answer: str, *keys: str) -> Dialogue:
    """One round; the whole answer is its key where nothing less is named."""
    return Dialogue(topic, lang, [Turn([query], [answer])], list(keys or [answer]))


def _conversation(topic: str, lang: str, rounds: list[tuple[str, str]], *keys: str) -> Dialogue:
    return Dialogue(topic, lang, [Turn([query], [answer]) for query, answer in rounds], list(keys))


def _lang(rng: random.Random) -> str:
    return "zh" if rng.random() < 0.6 else "en"


def _zh_name(rng: random.Random) -> str:
    if rng.random() < 0.25:
        return rng.choice(ZH_NICKNAMES)
    given = HANZI if rng.random() < 0.3 else ZH_GIVEN
    return rng.choice(ZH_SURNAMES) + "".join(rng.choice(given) for _ in range(rng.choice((1, 2, 2))))


def _en_name(rng: random.Random) -> str:
    name = rng.choice(EN_NAMES)
    return _made_up(name, "en", rng).capitalize() if rng.random() < 0.3 else name


def _name(rng: random.Random, split: str, lang: str) -> str:
    """A person's name; names are split one by one, so that evaluation uses names training never showed."""
    return _draw(rng, split, lambda: (_zh_name(rng) if lang == "zh" else _en_name(rng),))[0]


def _names(rng: random.Random, split: str, lang: str, count: int) -> list[str]:
    names = []
    while len(names) < count:
        name = _name(rng, split, lang)
        if not any(name in other or other in name for other in names):
            names.append(name)
    return names


def _relative(rng: random.Random, lang: str, name: str) -> str:
    """A relative or acquaintance of the user who may have this name: no brother Alice, no daughter 刚."""
    if lang == "zh":
        male, female = bool(ZH_MALE_GIVEN & set(name[1:])), bool(ZH_FEMALE_GIVEN & set(name[1:]))
    else:
        female = name in EN_FEMALE_NAMES
        male = not female and name not in EN_UNISEX_NAMES
    wrong = (FEMALE_RELATIVES if male else set()) | (MALE_RELATIVES if female else set())
    return rng.choice([word for word in (ZH_RELATIVES if lang == "zh" else EN_RELATIVES) if word not in wrong])


def _sentence_end(rng: random.Random, text: str) -> str:
    """The text with or without its end mark, as people type."""
    return text[:-1] if text[-1] in "。.？?" and rng.random() < 0.3 else text


def _article(noun: str) -> str:
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def _zh_list(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else "、".join(words[:-1]) + "和" + words[-1]


def _en_list(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]


# --- Memory over rounds -----------------------------------------------------------------------------------------------


def _with_filler(
    rng: random.Random, lang: str, told: list[tuple[str, str]], asked: tuple[str, str]
) -> list[tuple[str, str]]:
    """The rounds that tell something, none to two unrelated ones, and the question."""
    fillers = ZH_FILLERS if lang == "zh" else EN_FILLERS
    return told + rng.sample(fillers, rng.choices((0, 1, 2), (5, 4, 1))[0]) + [asked]


def _reply(question: str, answer: str) -> str:
    """The answer, with a yes before it where the question is whether something is remembered or known."""
    if "记得" in question or "知道" in question:
        return ("记得，" if "记得" in question else "知道，") + answer
    if question.startswith(("Do you", "Can you", "Remember")):
        return "Yes, " + answer[0].lower() + answer[1:]
    return answer


def remember_name(rng: random.Random, split: str) -> Dialogue:
    """The user says a name and asks for it later."""
    lang = _lang(rng)
    name = _name(rng, split, lang)
    if lang == "zh":
        city, job, age = rng.choice(ZH_CITIES), rng.choice(ZH_JOBS), rng.randint(6, 80)
        told = rng.choice(
            [
                f"我叫{name}", f"你好，我叫{name}", f"我的名字是{name}", f"我是{name}", f"叫我{name}就好", f"大家都叫我{name}",
                f"你好，我是{name}，很高兴认识你", f"我叫{name}，今年{age}岁", f"我叫{name}，来自{city}", f"我叫{name}，是一名{job}",
                f"自我介绍一下，我叫{name}", f"嗨，我是{name}", f"你可以叫我{name}", f"早上好，我叫{name}", f"记住，我叫{name}",
                f"初次见面，我叫{name}", f"我的姓名是{name}", f"hello，我叫{name}",
            ]
        )  # fmt: skip
        hello = rng.choice(
            [
                f"你好，{name}！很高兴认识你。", f"{name}，你好！有什么想聊的吗？", f"很高兴认识你，{name}！",
                f"{name}你好，很高兴和你聊天。", f"好的，{name}，我记住了。", f"你好，{name}！我是 ChatGLM-Tiny。",
            ]
        )  # fmt: skip
        ask = rng.choice(
            [
                "我叫什么名字？", "我叫什么？", "你还记得我的名字吗？", "你知道我叫什么吗？", "我刚才说我叫什么？", "请说出我的名字。",
                "我的名字是什么？", "我是谁？", "你还记得我是谁吗？", "说说我叫什么名字。", "你知道我是谁吗？", "我叫啥？", "那我叫什么名字呢？",
                "刚才我告诉你的名字是什么？", "你记得我叫什么名字吗？", "还记得我吗？", "猜猜我叫什么？",
            ]
        )  # fmt: skip
        if "刚才" in ask:
            reply = f"你刚才说，你叫{name}。"
        elif "谁" in ask or "记得我吗" in ask:
            reply = f"你是{name}。"
        else:
            reply = rng.choice([f"你叫{name}。", f"你的名字是{name}。"])
        told = told + rng.choice(["", "", "。", "！"])
    else:
        city, job = rng.choice(EN_CITIES), rng.choice(EN_JOBS)
        told = rng.choice(
            [
                f"My name is {name}.", f"Hi, my name is {name}.", f"I am {name}.", f"Hello, I'm {name}.", f"Call me {name}.",
                f"You can call me {name}.", f"My name's {name}. Nice to meet you!", f"I'm {name} and I live in {city}.",
                f"I'm {name}, {_article(job)}.", f"Hello! {name} here.", f"People call me {name}.", f"Hey there, I am {name} from {city}.",
                f"Please remember my name: {name}.", f"Good morning, my name is {name}.", f"Let me introduce myself. I'm {name}.",
                f"This is {name}.",
            ]
        )  # fmt: skip
        hello = rng.choice(
            [
                f"Hello, {name}! It is nice to meet you.", f"Hi {name}! What shall we talk about?", f"Nice to meet you, {name}!",
                f"Good to meet you, {name}. How are you today?", f"Hello, {name}! I am ChatGLM-Tiny.",
            ]
        )  # fmt: skip
        ask = rng.choice(
            [
                "What is my name?", "What's my name?", "Do you remember my name?", "Who am I?", "Do you know my name?", "Tell me my name.",
                "Can you tell me my name?", "What did I say my name was?", "Please say my name.", "So, what is my name?",
                "Do you know who I am?", "What name did I give you?", "Do you still remember my name?", "Remember my name?",
            ]
        )  # fmt: skip
        if "did I" in ask:
            reply = f"You told me that your name is {name}."
        else:
            reply = f"You are {name}." if "who" in ask.lower() else f"Your name is {name}."
        told = _sentence_end(rng, told)
    asked = (_sentence_end(rng, ask) if lang == "en" else ask, _reply(ask, reply))
    return _conversation("memory/name", lang, _with_filler(rng, lang, [(told, hello)], asked), name)


def _zh_facts(rng: random.Random, split: str) -> list[tuple[str, str, list[str], list[str], str]]:
    """(statement, acknowledgement, questions, answers, key) for each kind of fact a user may tell; slots belong to the split."""
    city, other_city = _draw(rng, split, lambda: tuple(rng.sample(ZH_CITIES, 2)))
    job, colour = _draw(rng, split, lambda: (rng.choice(ZH_JOBS), rng.choice(ZH_COLOURS)))
    fruit, food = _draw(rng, split, lambda: (rng.choice(ZH_FRUITS), rng.choice(ZH_FOODS)))
    pet, pet_name = _draw(rng, split, lambda: (rng.choice(ZH_PETS), rng.choice(ZH_PET_NAMES)))
    thing, place = _draw(rng, split, lambda: (rng.choice(ZH_THINGS), rng.choice(ZH_PLACES)))
    hobby, day = _draw(rng, split, lambda: (rng.choice(ZH_HOBBIES), rng.choice(ZH_DAYS)))
    month, date = _draw(rng, split, lambda: (rng.randint(1, 12), rng.randint(1, 28)))
    (age, room, seat) = _draw(rng, split, lambda: (rng.randint(5, 90), rng.randint(101, 999), rng.randint(1, 60)))
    drink, instrument = _draw(rng, split, lambda: (rng.choice(ZH_DRINKS), rng.choice(ZH_INSTRUMENTS)))
    language, season = _draw(rng, split, lambda: (rng.choice(ZH_LANGUAGES), rng.choice(ZH_SEASONS)))
    size, bus, locker = _draw(rng, split, lambda: (rng.randint(34, 46), rng.randint(1, 899), rng.randint(1, 200)))
    allergy, club = _draw(rng, split, lambda: (rng.choice(ZH_ALLERGENS), rng.choice(ZH_CLUBS)))
    hour, floor = _draw(rng, split, lambda: (rng.randint(5, 9), rng.randint(2, 30)))
    event = rng.choice("看牙医 考试 开会 面试 搬家 体检 聚餐 理发 上舞蹈课 比赛".split())
    teacher = _name(rng, split, "zh")
    friend = _name(rng, split, "zh")
    relative = _relative(rng, "zh", friend)
    return [
        (rng.choice([f"我住在{city}", f"我家在{city}", f"我现在住在{city}"]), f"好的，你住在{city}。",
         ["我住在哪里？", "我住在哪个城市？", "我家在哪儿？", "你记得我住哪里吗？"], [f"你住在{city}。"], city),
        (rng.choice([f"我是{city}人", f"我来自{city}"]), f"{city}是个好地方。",
         ["我来自哪里？", "我是哪里人？"], [f"你来自{city}。", f"你是{city}人。"], city),
        (rng.choice([f"我的老家在{city}", f"我老家是{city}"]), f"{city}是个好地方。",
         ["我的老家在哪里？", "我老家是哪儿？", "你记得我老家在哪里吗？"], [f"你的老家在{city}。"], city),
        (rng.choice([f"我是一名{job}", f"我的工作是{job}", f"我当{job}已经好几年了", f"我做{job}", f"我是{job}"]), f"{job}这份工作不容易，辛苦了。",
         ["我是做什么工作的？", "我的职业是什么？", "你记得我的工作吗？", "我做哪一行？", "你知道我靠什么谋生吗？"], [f"你是一名{job}。"], job),
        (rng.choice([f"我最喜欢的颜色是{colour}", f"我最喜欢{colour}"]), f"{colour}很好看。",
         ["我最喜欢什么颜色？", "我喜欢的颜色是什么？", "你记得我喜欢什么颜色吗？", "我喜欢哪种颜色？"], [f"你最喜欢{colour}。", f"你喜欢的颜色是{colour}。"], colour),
        (rng.choice([f"我最爱吃的水果是{fruit}", f"水果里我最喜欢{fruit}"]), f"{fruit}确实好吃。",
         ["我最爱吃什么水果？", "我喜欢哪种水果？", "我最喜欢的水果是什么？"], [f"你最喜欢吃{fruit}。"], fruit),
        (rng.choice([f"我最爱吃{food}", f"我喜欢吃{food}", f"我最喜欢的食物是{food}"]), f"{food}很香，我记住了。",
         ["我最爱吃什么？", "我喜欢吃什么？", "我最喜欢的食物是什么？"], [f"你最喜欢吃{food}。", f"你爱吃{food}。"], food),
        (rng.choice([f"我的{pet}叫{pet_name}", f"我养了一只{pet}，名叫{pet_name}", f"我家的{pet}名字是{pet_name}"]), f"{pet_name}，真可爱的名字！",
         [f"我的{pet}叫什么？", f"我的{pet}叫什么名字？", "我的宠物叫什么？", f"你还记得我的{pet}的名字吗？"], [f"你的{pet}叫{pet_name}。"], pet_name),
        (rng.choice([f"我把{thing}放在{place}了", f"{thing}在{place}", f"帮我记一下，{thing}放在{place}"]), f"好的，{thing}在{place}。",
         [f"我的{thing}在哪里？", f"{thing}放在哪儿了？", f"我把{thing}放哪里了？", f"{thing}在什么地方？"], [f"你的{thing}在{place}。"], place),
        (rng.choice([f"我的爱好是{hobby}", f"我平时喜欢{hobby}", f"我有空就{hobby}"]), f"{hobby}是个好爱好。",
         ["我的爱好是什么？", "我平时喜欢做什么？", "你记得我的爱好吗？"], [f"你的爱好是{hobby}。", f"你喜欢{hobby}。"], hobby),
        (rng.choice([f"我{day}要{event}", f"{day}我得去{event}", f"我{event}是{day}"]), f"好的，记下了，是{day}。",
         ["是星期几？", "那件事在星期几？", "我说的是星期几？", f"我星期几{event}？", f"我哪天要{event}？"], [f"是{day}。"], day),
        (rng.choice([f"我的生日是{month}月{date}日", f"我{month}月{date}日过生日"]), f"记住了，{month}月{date}日。",
         ["我的生日是哪天？", "我什么时候过生日？", "我的生日是几月几日？"], [f"你的生日是{month}月{date}日。"], f"{month}月{date}日"),
        (rng.choice([f"我今年{age}岁", f"我{age}岁了"]), "知道了，谢谢你告诉我。",
         ["我多大了？", "我今年几岁？", "你知道我的年龄吗？"], [f"你今年{age}岁。"], str(age)),
        (rng.choice([f"我的房间号是{room}", f"我住{room}房间"]), f"好的，{room}房间。",
         ["我的房间号是多少？", "我住几号房？"], [f"你的房间号是{room}。"], str(room)),
        (rng.choice([f"我的座位是{seat}号", f"请记住，我坐{seat}号座位"]), f"好的，{seat}号座位。",
         ["我的座位是几号？", "我坐几号？"], [f"你的座位是{seat}号。"], str(seat)),
        (rng.choice([f"我{relative}叫{friend}", f"我的{relative}名叫{friend}"]), f"{friend}，这个名字不错。",
         [f"我{relative}叫什么？", f"我的{relative}叫什么名字？", f"你记得我{relative}的名字吗？"], [f"你{relative}叫{friend}。"], friend),
        (rng.choice([f"我打算先去{city}，再去{other_city}", f"我的旅行计划是先到{city}，然后到{other_city}"]), f"先{city}，后{other_city}，记住了。",
         ["我先去哪里？", "第一站是哪里？"], [f"你先去{city}。", f"第一站是{city}。"], city),
        (rng.choice([f"我每天都要喝{drink}", f"我最爱喝的是{drink}"]), f"{drink}不错，记住了。",
         ["我爱喝什么？", "我每天喝什么？", "你记得我最爱喝什么吗？"], [f"你爱喝{drink}。"], drink),
        (rng.choice([f"我在学{instrument}", f"我学的乐器是{instrument}"]), f"{instrument}的声音很好听。",
         ["我学的是什么乐器？", "我在学什么乐器？"], [f"你学的是{instrument}。"], instrument),
        (rng.choice([f"我正在学{language}", f"最近我开始学{language}了"]), f"学{language}，加油！",
         ["我在学什么语言？", "我学的是哪门外语？"], [f"你在学{language}。"], language),
        (rng.choice([f"四季里我最喜欢{season}", f"我最喜欢的季节是{season}"]), f"{season}确实很美。",
         ["我最喜欢哪个季节？", "四季里我喜欢什么？"], [f"你最喜欢{season}。"], season),
        (rng.choice([f"我穿{size}码的鞋", f"我的鞋码是{size}"]), f"好的，{size}码。",
         ["我穿多大的鞋？", "我的鞋码是多少？"], [f"你穿{size}码的鞋。"], str(size)),
        (rng.choice([f"我上班坐{bus}路公交", f"我每天坐{bus}路车"]), f"记下了，{bus}路。",
         ["我坐几路车？", "我上班坐哪路公交？"], [f"你坐{bus}路公交。"], str(bus)),
        (rng.choice([f"我的柜子是{locker}号", f"我用的储物柜号码是{locker}"]), f"好的，{locker}号柜子。",
         ["我的柜子是几号？", "我的储物柜号码是多少？"], [f"你的柜子是{locker}号。"], str(locker)),
        (rng.choice([f"我对{allergy}过敏", f"请记住，我对{allergy}过敏"]), f"知道了，要避开{allergy}。",
         ["我对什么过敏？", "你记得我对什么过敏吗？"], [f"你对{allergy}过敏。"], allergy),
        (rng.choice([f"我参加了{club}", f"我是{club}的成员"]), f"{club}一定很有意思。",
         ["我参加了什么社团？", "我是哪个社团的？"], [f"你参加了{club}。"], club),
        (rng.choice([f"我早上{hour}点起床", f"我的闹钟定在早上{hour}点"]), f"好的，早上{hour}点。",
         ["我几点起床？", "我的闹钟是几点？"], [f"早上{hour}点。"], f"{hour}点"),
        (rng.choice([f"我家在{floor}楼", f"我住{floor}楼"]), f"{floor}楼，记住了。",
         ["我住几楼？", "我家在几层？"], [f"你住{floor}楼。"], f"{floor}楼"),
        (rng.choice([f"我的班主任叫{teacher}", f"我们班主任是{teacher}"]), f"{teacher}老师，记住了。",
         ["我的班主任叫什么？", "我的班主任是谁？"], [f"你的班主任叫{teacher}。"], teacher),
    ]  # fmt: skip


def _en_facts(rng: random.Random, split: str) -> list[tuple[str, str, list[str], list[str], str]]:
    """The English twin of _zh_facts."""
    city, other_city = _draw(rng, split, lambda: tuple(rng.sample(EN_CITIES, 2)))
    job, colour = _draw(rng, split, lambda: (rng.choice(EN_JOBS), rng.choice(EN_COLOURS)))
    fruit, food = _draw(rng, split, lambda: (rng.choice(EN_FRUITS), rng.choice(EN_FOODS)))
    pet, pet_name = _draw(rng, split, lambda: (rng.choice(EN_PETS), rng.choice(EN_PET_NAMES)))
    thing, place = _draw(rng, split, lambda: (rng.choice(EN_THINGS), rng.choice(EN_PLACES)))
    hobby, day = _draw(rng, split, lambda: (rng.choice(EN_HOBBIES), rng.choice(EN_DAYS)))
    month, date = _draw(rng, split, lambda: (rng.choice(EN_MONTHS), rng.randint(1, 28)))
    age, room, seat = _draw(rng, split, lambda: (rng.randint(5, 90), rng.randint(101, 999), rng.randint(1, 60)))
    drink, instrument = _draw(rng, split, lambda: (rng.choice(EN_DRINKS), rng.choice(EN_INSTRUMENTS)))
    language, season = _draw(rng, split, lambda: (rng.choice(EN_LANGUAGES), rng.choice(EN_SEASONS)))
    size, bus, locker = _draw(rng, split, lambda: (rng.randint(34, 46), rng.randint(1, 899), rng.randint(1, 200)))
    allergy, club = _draw(rng, split, lambda: (rng.choice(EN_ALLERGENS), rng.choice(EN_CLUBS)))
    hour, floor = _draw(rng, split, lambda: (rng.randint(5, 9), rng.randint(2, 30)))
    friend = _name(rng, split, "en")
    relative = _relative(rng, "en", friend)
    event = rng.choice(
        "exam|meeting|interview|haircut|dance class|party|concert|check-up|football match|flight".split("|")
    )
    if rng.random() < 0.4:
        place = (
            f"{rng.choice(('in', 'under', 'behind', 'next to'))} the {rng.choice(EN_COLOURS)} {rng.choice(EN_GOODS)}"
        )
    where = place.replace("my ", "your ")
    plural = thing in ("keys", "glasses", "gloves", "headphones")
    are, they = ("are", "They are") if plural else ("is", "It is")
    return [
        (rng.choice([f"I live in {city}.", f"My home is in {city}.", f"I have lived in {city} for years."]), f"{city} sounds like a nice place to live.",
         ["Where do I live?", "Which city do I live in?", "What city do I live in?", "Do you remember where I live?"], [f"You live in {city}."], city),
        (rng.choice([f"I am from {city}.", f"I come from {city}.", f"I grew up in {city}."]), f"I hope to hear more about {city}.",
         ["Where am I from?", "Where do I come from?", "Do you know where I am from?"], [f"You are from {city}."], city),
        (rng.choice([f"I work as {_article(job)}.", f"I am {_article(job)}.", f"My job: I'm {_article(job)}."]), "That is an important job.",
         ["What is my job?", "What do I do for a living?", "What's my job?", "Do you remember my job?", "What kind of work do I do?"], [f"You are {_article(job)}.", f"You work as {_article(job)}."], job),
        (rng.choice([f"My favourite colour is {colour}.", f"I like {colour} best of all colours.", f"My favorite color is {colour}."]),
         f"{colour.capitalize()} is a lovely colour.",
         ["What is my favourite colour?", "Which colour do I like best?", "What's my favorite color?", "Which colour do I love?"], [f"Your favourite colour is {colour}."], colour),
        (rng.choice([f"My favourite fruit is {fruit}.", f"I love {fruit} more than any other fruit."]), f"Fresh {fruit} are delicious.",
         ["What is my favourite fruit?", "Which fruit do I like best?"], [f"You like {fruit} best."], fruit),
        (rng.choice([f"I love {food}.", f"My favourite food is {food}.", f"I could eat {food} every day."]), f"Enjoy your {food}!",
         ["What is my favourite food?", "What do I like to eat?", "What food do I love?"], [f"You love {food}."], food),
        (rng.choice([f"My {pet} is called {pet_name}.", f"I have {_article(pet)} named {pet_name}.", f"My {pet}'s name is {pet_name}."]),
         f"{pet_name} is a cute name!",
         [f"What is my {pet} called?", f"What is my {pet}'s name?", "What is the name of my pet?", f"Do you remember my {pet}'s name?"],
         [f"Your {pet} is called {pet_name}."], pet_name),
        (rng.choice([f"My {thing} {are} {place}.", f"I left my {thing} {place}.", f"I put my {thing} {place}."]), f"All right, your {thing} {are} {where}.",
         [f"Where {are} my {thing}?", f"Where did I put my {thing}?", f"Where did I leave my {thing}?"], [f"Your {thing} {are} {where}.", f"{they} {where}."], where),
        (rng.choice([f"My hobby is {hobby}.", f"In my free time I enjoy {hobby}.", f"I like {hobby}."]), f"{hobby.capitalize()} is a good hobby.",
         ["What is my hobby?", "What do I like to do?", "What do I enjoy in my free time?"], [f"Your hobby is {hobby}.", f"You like {hobby}."], hobby),
        (rng.choice([f"My {event} is on {day}.", f"I have {_article(event)} on {day}.", f"There is {_article(event)} on {day}."]), f"Noted: {day}.",
         ["Which day is it on?", "What day did I say?", f"When is my {event}?", f"Which day is my {event} on?", f"What day is the {event}?"],
         [f"It is on {day}.", f"Your {event} is on {day}."], day),
        (rng.choice([f"My birthday is on {month} {date}.", f"I was born on {month} {date}."]), f"I will keep it in mind: {month} {date}.",
         ["When is my birthday?", "On which day is my birthday?", "What date is my birthday?"], [f"Your birthday is on {month} {date}."], f"{month} {date}"),
        (rng.choice([f"I am {age} years old.", f"I'm {age} years old."]), "Thank you for telling me.",
         ["How old am I?", "What is my age?"], [f"You are {age} years old."], str(age)),
        (rng.choice([f"My room number is {room}.", f"I am in room {room}."]), f"All right, room {room}.",
         ["What is my room number?", "Which room am I in?"], [f"Your room number is {room}."], str(room)),
        (rng.choice([f"My seat is number {seat}.", f"Please remember, my seat number is {seat}."]), f"Noted, seat {seat}.",
         ["What is my seat number?", "Which seat do I have?"], [f"Your seat number is {seat}."], str(seat)),
        (rng.choice([f"My {relative} is called {friend}.", f"My {relative}'s name is {friend}."]), f"{friend} is a nice name.",
         [f"What is my {relative}'s name?", f"What is my {relative} called?"], [f"Your {relative}'s name is {friend}.", f"Your {relative} is called {friend}."], friend),
        (rng.choice([f"I will go to {city} first and then to {other_city}.", f"My trip goes to {city} first, then to {other_city}."]),
         f"First {city}, then {other_city}. Have a good trip!",
         ["Where do I go first?", "What is my first stop?"], [f"You go to {city} first."], city),
        (rng.choice([f"I drink {drink} every day.", f"My favourite drink is {drink}."]), f"Enjoy your {drink}!",
         ["What do I like to drink?", "What is my favourite drink?"], [f"You like {drink}."], drink),
        (rng.choice([f"I play the {instrument}.", f"My instrument is the {instrument}."]), f"I like the sound of the {instrument}.",
         ["Which instrument do I play?", "What is my instrument?"], [f"You play the {instrument}."], instrument),
        (rng.choice([f"I am learning {language}.", f"I have started to learn {language}."]), f"Good luck with {language}!",
         ["Which language am I learning?", "Which language do I study?"], [f"You are learning {language}."], language),
        (rng.choice([f"My favourite season is {season}.", f"I like {season} best of all seasons."]), f"{season.capitalize()} is lovely.",
         ["What is my favourite season?", "Which season do I like best?"], [f"You like {season} best."], season),
        (rng.choice([f"My shoe size is {size}.", f"I wear shoes in size {size}."]), f"Noted, size {size}.",
         ["What is my shoe size?", "Which shoe size do I wear?"], [f"Your shoe size is {size}."], str(size)),
        (rng.choice([f"I take bus {bus} to work.", f"My bus is number {bus}."]), f"All right, bus {bus}.",
         ["Which bus do I take?", "What is my bus number?"], [f"You take bus {bus}."], str(bus)),
        (rng.choice([f"My locker is number {locker}.", f"I use locker {locker}."]), f"Noted, locker {locker}.",
         ["What is my locker number?", "Which locker is mine?"], [f"Your locker is number {locker}."], str(locker)),
        (rng.choice([f"I am allergic to {allergy}.", f"Please remember that I am allergic to {allergy}."]), f"I see, no {allergy} for you.",
         ["What am I allergic to?", "Do you remember my allergy?"], [f"You are allergic to {allergy}."], allergy),
        (rng.choice([f"I joined {club}.", f"I am a member of {club}."]), "That sounds like fun.",
         ["Which club am I in?", "Which club do I belong to?"], [f"You are in {club}."], club),
        (rng.choice([f"I get up at {hour} in the morning.", f"My alarm is set to {hour} in the morning."]), f"All right, {hour} in the morning.",
         ["When do I get up?", "What time is my alarm?"], [f"At {hour} in the morning."], str(hour)),
        (rng.choice([f"I live on floor {floor}.", f"My flat is on floor {floor}."]), f"Floor {floor}, I see.",
         ["On which floor do I live?", "Which floor is my flat on?"], [f"You live on floor {floor}."], str(floor)),
    ]  # fmt: skip


def remember_fact(rng: random.Random, split: str) -> Dialogue:
    """The user tells one or two facts, in one round or two, and asks for one of them later."""
    lang = _lang(rng)
    facts = rng.sample(_zh_facts(rng, split) if lang == "zh" else _en_facts(rng, split), rng.choices((1, 2), (6, 4))[0])
    if lang == "en":
        told = [(_sentence_end(rng, statement), acknowledgement) for statement, acknowledgement, *_ in facts]
    else:
        told = [(statement + rng.choice(["", "。"]), acknowledgement) for statement, acknowledgement, *_ in facts]
    if len(facts) == 2 and rng.random() < 0.5:
        first, second = facts
        joined = f"{first[0]}，{second[0]}" if lang == "zh" else f"{first[0]} {second[0]}"
        told = [(joined, "好的，我都记住了。" if lang == "zh" else "All right, I will remember both.")]
    _, _, questions, answers, key = rng.choice(facts)
    question = rng.choice(questions)
    asked = (_sentence_end(rng, question), _reply(question, rng.choice(answers)))
    return _conversation("memory/fact", lang, _with_filler(rng, lang, told, asked), key)


def remember_two(rng: random.Random, split: str) -> Dialogue:
    """Two names belong to two people, or a name is corrected; the question asks for the right one."""
    lang = _lang(rng)
    first, second = _names(rng, split, lang, 2)
    if rng.random() < 0.35:
        if lang == "zh":
            told = [
                (f"我叫{first}", f"你好，{first}！"),
                (
                    rng.choice(
                        [f"说错了，我叫{second}", f"不对，我叫{second}，不叫{first}", f"我改名了，现在叫{second}"]
                    ),
                    f"好的，{second}，我记住了。",
                ),
            ]
            asked = (rng.choice(["我叫什么名字？", "我叫什么？", "那我现在叫什么？"]), f"你叫{second}。")
        else:
            told = [
                (f"My name is {first}.", f"Hello, {first}!"),
                (
                    rng.choice(
                        [
                            f"Sorry, I mean {second}, not {first}.",
                            f"No, my name is {second}.",
                            f"Please call me {second} instead.",
                        ]
                    ),
                    f"All right, {second}, I will remember that.",
                ),
            ]
            asked = rng.choice(
                [
                    (rng.choice(["What is my name?", "So what is my name?"]), f"Your name is {second}."),
                    ("What should you call me?", f"I should call you {second}."),
                ]
            )
    elif lang == "zh":
        relative = _relative(rng, "zh", second)
        told = [(f"我叫{first}，我{relative}叫{second}", f"你好，{first}！也问{second}好。")]
        asked = rng.choice(
            [
                (rng.choice(["我叫什么名字？", "我叫什么？"]), f"你叫{first}。"),
                (rng.choice([f"我{relative}叫什么？", f"我{relative}叫什么名字？"]), f"你{relative}叫{second}。"),
            ]
        )
    else:
        relative = _relative(rng, "en", second)
        told = [(f"I am {first} and my {relative} is called {second}.", f"Hello, {first}! Say hello to {second} too.")]
        asked = rng.choice(
            [
                ("What is my name?", f"Your name is {first}."),
                ("Who am I?", f"You are {first}."),
                (
                    rng.choice([f"What is my {relative} called?", f"What is my {relative}'s name?"]),
                    f"Your {relative} is called {second}.",
                ),
            ]
        )
    return _conversation(
        "memory/two", lang, _with_filler(rng, lang, told, asked), second if second in asked[1] else first
    )


def remember_nothing(rng: random.Random, split: str) -> Dialogue:
    """The user asks for something never told: the honest answer is that it was not told."""
    lang = _lang(rng)
    if lang == "zh":
        relative, pet, thing = _draw(
            rng, split, lambda: (rng.choice(ZH_RELATIVES), rng.choice(ZH_PETS), rng.choice(ZH_THINGS))
        )
        ask, what = rng.choice(
            [
                ("我叫什么名字？", "你的名字"), ("我叫什么？", "你的名字"), ("你知道我的名字吗？", "你的名字"), ("我是谁？", "你是谁"), ("你还记得我叫什么吗？", "你的名字"),
                ("我住在哪里？", "你住在哪里"), ("我多大了？", "你的年龄"), ("我是做什么工作的？", "你的工作"), ("我最喜欢什么颜色？", "你喜欢什么颜色"),
                ("我的生日是哪天？", "你的生日"), ("我的电话号码是多少？", "你的电话号码"), (f"我{relative}叫什么名字？", f"你{relative}的名字"),
                (f"我的{pet}叫什么？", f"你的{pet}的名字"), (f"我的{thing}在哪里？", f"你的{thing}在哪里"), ("我最爱吃什么？", "你爱吃什么"), ("我来自哪里？", "你来自哪里"),
                (f"你知道我{relative}叫什么吗？", f"你{relative}的名字"), (f"我把{thing}放哪儿了？", f"你的{thing}在哪里"), ("我爱喝什么？", "你爱喝什么"),
                ("我在学什么语言？", "你在学什么语言"), ("我的鞋码是多少？", "你的鞋码"), ("我坐几路车？", "你坐几路车"), ("我对什么过敏？", "你对什么过敏"),
                ("我几点起床？", "你几点起床"), ("我住几楼？", "你住几楼"), ("我的班主任叫什么？", "你的班主任叫什么"), ("我参加了什么社团？", "你参加了什么社团"),
            ]
        )  # fmt: skip
        reply = rng.choice(
            [
                f"我不知道{what}，你还没有告诉我。",
                f"你还没有告诉过我，所以我不知道{what}。",
                f"抱歉，我不知道{what}，可以告诉我吗？",
            ]
        )
    else:
        relative, pet, thing = _draw(
            rng, split, lambda: (rng.choice(EN_RELATIVES), rng.choice(EN_PETS), rng.choice(EN_THINGS))
        )
        are = "are" if thing in ("keys", "glasses", "gloves", "headphones") else "is"
        ask, what = rng.choice(
            [
                ("What is my name?", "your name"), ("Do you know my name?", "your name"), ("Who am I?", "who you are"), ("Where do I live?", "where you live"),
                ("Do you remember my name?", "your name"), ("How old am I?", "how old you are"), ("What is my job?", "what your job is"),
                ("What is my favourite colour?", "your favourite colour"), ("When is my birthday?", "when your birthday is"),
                ("What is my phone number?", "your phone number"), (f"What is my {relative}'s name?", f"your {relative}'s name"),
                (f"What is my {pet} called?", f"your {pet}'s name"), (f"Where {are} my {thing}?", f"where your {thing} {are}"),
                ("What is my favourite food?", "your favourite food"), ("Where am I from?", "where you are from"),
                (f"Do you know my {relative}'s name?", f"your {relative}'s name"), (f"Where did I put my {thing}?", f"where your {thing} {are}"),
                ("What is my favourite drink?", "your favourite drink"), ("Which language am I learning?", "which language you are learning"),
                ("What is my shoe size?", "your shoe size"), ("Which bus do I take?", "which bus you take"), ("What am I allergic to?", "what you are allergic to"),
                ("When do I get up?", "when you get up"), ("On which floor do I live?", "which floor you live on"), ("Which club am I in?", "which club you are in"),
            ]
        )  # fmt: skip
        reply = rng.choice(
            [
                f"I do not know {what}, because you have not told me.",
                f"You have not told me, so I do not know {what}.",
                f"Sorry, I do not know {what}. Will you tell me?",
            ]
        )
    fillers = ZH_FILLERS if lang == "zh" else EN_FILLERS
    rounds = rng.sample(fillers, rng.choices((0, 1, 2), (4, 4, 2))[0])
    return _conversation("notold/fact", lang, [*rounds, (_sentence_end(rng, ask), reply)], what)


# --- Extraction and copying -------------------------------------------------------------------------------------------


def _phone(rng: random.Random) -> str:
    return "1" + rng.choice("3578") + "".join(rng.choice("0123456789") for _ in range(9))


def _zh_record(rng: random.Random, split: str) -> tuple[str, dict[str, str]]:
    """A sentence and the fields it names, in the order of the sentence."""
    (name, boss), city = _names(rng, split, "zh", 2), rng.choice(ZH_CITIES)
    job, age, date = rng.choice(ZH_JOBS), rng.randint(6, 80), f"{rng.randint(1, 12)}月{rng.randint(1, 28)}日"
    part, first, last = rng.choice([("上午", 7, 11), ("下午", 1, 6), ("晚上", 7, 9)])
    clock = f"{part}{rng.randint(first, last)}点{rng.choice(['', '', '半'])}"
    fruit, count, price = rng.choice(ZH_FRUITS), rng.randint(2, 30), rng.randint(3, 99)
    event, room = (
        rng.choice(["会议", "讲座", "面试", "培训", "聚会", "比赛", "考试", "展览"]),
        f"{rng.randint(101, 909)}教室",
    )
    phone, mail = (
        _phone(rng),
        f"{_name(rng, split, 'en').lower()}{rng.randint(1, 99)}@example.{rng.choice(['com', 'org', 'net'])}",
    )
    organisation, place, when = (
        rng.choice(ZH_ORGANISATIONS),
        rng.choice(ZH_ROOMS),
        f"周{rng.choice('一二三四五六日')}{clock}",
    )
    goods, amount = _draw(rng, split, lambda: (rng.choice(ZH_GOODS), rng.randint(20, 980)))
    order, salary = f"{rng.choice('ABDHKX')}{rng.randint(10000, 99999)}", f"{rng.randint(30, 200)}00元"
    train, seat = f"{rng.choice('GDKT')}{rng.randint(1, 999)}", f"{rng.randint(1, 16)}车{rng.randint(1, 20)}号"
    return rng.choice(
        [
            (f"我叫{name}，住在{city}", {"姓名": name, "城市": city}),
            (f"{name}今年{age}岁，是{city}人", {"姓名": name, "年龄": f"{age}岁", "城市": city}),
            (f"{name}是一名{job}，在{city}工作", {"姓名": name, "职业": job, "城市": city}),
            (f"{name}的电话是{phone}", {"姓名": name, "电话": phone}),
            (f"请联系{name}，手机号{phone}，地址在{city}", {"姓名": name, "手机": phone, "城市": city}),
            (f"{name}{date}从{city}出发", {"姓名": name, "日期": date, "城市": city}),
            (f"{event}定在{date}{clock}，地点是{room}", {"活动": event, "日期": date, "时刻": clock, "地点": room}),
            (f"{date}{clock}在{city}有一场{event}", {"日期": date, "时刻": clock, "城市": city, "活动": event}),
            (
                f"{name}买了{count}斤{fruit}，花了{price}元",
                {"姓名": name, "商品": fruit, "数量": f"{count}斤", "价格": f"{price}元"},
            ),
            (
                f"我要{count}箱{fruit}，一共{price}元，送到{city}",
                {"商品": fruit, "数量": f"{count}箱", "价格": f"{price}元", "城市": city},
            ),
            (f"{name}在{organisation}上班，是一名{job}", {"姓名": name, "单位": organisation, "职业": job}),
            (f"{organisation}将于{date}在{place}举行{event}", {"单位": organisation, "日期": date, "地点": place, "活动": event}),
            (f"订单{order}已发货，收件人{name}，电话{phone}", {"订单号": order, "姓名": name, "电话": phone}),
            (f"您好，我的订单号是{order}，买的是{goods}，请退款{amount}元", {"订单号": order, "商品": goods, "金额": f"{amount}元"}),
            (f"有事请发邮件到{mail}，找{name}", {"邮箱": mail, "姓名": name}),
            (f"{name}的邮箱是{mail}，手机是{phone}", {"姓名": name, "邮箱": mail, "手机": phone}),
            (f"{when}请到{place}参加{event}，联系人{name}", {"时间": when, "地点": place, "活动": event, "姓名": name}),
            (f"{name}给{organisation}转了{amount}元", {"姓名": name, "单位": organisation, "金额": f"{amount}元"}),
            (f"收据：{date}，{name}，交{organisation}{amount}元", {"日期": date, "姓名": name, "单位": organisation, "金额": f"{amount}元"}),
            (f"{name}买了{train}次列车的票，{seat}，去{city}", {"姓名": name, "车次": train, "座位": seat, "城市": city}),
            (f"请把{goods}寄到{city}，收件人是{name}，订单号{order}", {"商品": goods, "城市": city, "姓名": name, "订单号": order}),
            (f"我想{when}预约{organisation}，姓名{name}，电话{phone}", {"时间": when, "单位": organisation, "姓名": name, "电话": phone}),
            (f"{organisation}招聘{job}，月薪{salary}，简历发到{mail}", {"单位": organisation, "职业": job, "月薪": salary, "邮箱": mail}),
            (f"会议由{boss}主持，{name}记录，{when}开始", {"主持人": boss, "记录人": name, "时间": when}),
            (f"{goods}原价{amount + 50}元，现价{amount}元", {"商品": goods, "原价": f"{amount + 50}元", "现价": f"{amount}元"}),
            (f"{name}，{age}岁，{city}人，{job}，电话{phone}", {"姓名": name, "年龄": f"{age}岁", "城市": city, "职业": job, "电话": phone}),
        ]
    )  # fmt: skip


def _en_record(rng: random.Random, split: str) -> tuple[str, dict[str, str]]:
    """The English twin of _zh_record."""
    (name, boss), city = _names(rng, split, "en", 2), rng.choice(EN_CITIES)
    job, age, date = rng.choice(EN_JOBS), rng.randint(6, 80), f"{rng.choice(EN_MONTHS)} {rng.randint(1, 28)}"
    clock, day = f"{rng.randint(1, 12)} {rng.choice(['a.m.', 'p.m.'])}", rng.choice(EN_DAYS)
    fruit, count, price = rng.choice(EN_FRUITS), rng.randint(2, 30), rng.randint(3, 99)
    event, room = (
        rng.choice(["meeting", "lecture", "interview", "party", "match", "exam", "concert"]),
        f"room {rng.randint(101, 909)}",
    )
    phone = f"555-{rng.randint(1000, 9999)}"
    mail = f"{name.lower()}.{rng.choice(['office', 'home', 'desk', 'team'])}{rng.randint(1, 99)}@example.{rng.choice(['com', 'org', 'net'])}"
    organisation, hall = rng.choice(EN_ORGANISATIONS), rng.choice(EN_ROOMS)
    goods, amount = _draw(rng, split, lambda: (rng.choice(EN_GOODS), f"{rng.randint(5, 980)} dollars"))
    order = f"{rng.choice('ABDHKX')}-{rng.randint(10000, 99999)}"
    return rng.choice(
        [
            (f"My name is {name} and I live in {city}.", {"name": name, "city": city}),
            (f"{name} is {age} years old and comes from {city}.", {"name": name, "age": str(age), "city": city}),
            (f"{name} works as {_article(job)} in {city}.", {"name": name, "job": job, "city": city}),
            (f"Please call {name} at {phone}.", {"name": name, "phone": phone}),
            (f"You can reach {name} in {city} at {phone}.", {"name": name, "city": city, "phone": phone}),
            (f"{name} will leave {city} on {date}.", {"name": name, "city": city, "date": date}),
            (
                f"The {event} is on {day} at {clock} in {room}.",
                {"event": event, "day": day, "time": clock, "place": room},
            ),
            (f"On {date} there is {_article(event)} in {city}.", {"date": date, "event": event, "city": city}),
            (
                f"{name} bought {count} {fruit} for {price} dollars.",
                {"name": name, "item": fruit, "quantity": str(count), "price": f"{price} dollars"},
            ),
            (
                f"I would like {count} {fruit}, delivered to {city} on {day}.",
                {"item": fruit, "quantity": str(count), "city": city, "day": day},
            ),
            (f"{name} works for {organisation} as {_article(job)}.", {"name": name, "company": organisation, "job": job}),
            (f"{organisation} invites you to {_article(event)} on {date} at {hall}.", {"company": organisation, "event": event, "date": date, "place": hall}),
            (f"Order {order} for {name} was shipped to {city}.", {"order": order, "name": name, "city": city}),
            (f"My order number is {order}. I bought {_article(goods)} and want {amount} back.", {"order": order, "item": goods, "amount": amount}),
            (f"Please write to {name} at {mail}.", {"name": name, "email": mail}),
            (f"{name} can be reached at {phone} or {mail}.", {"name": name, "phone": phone, "email": mail}),
            (f"{name} paid {amount} to {organisation} on {date}.", {"name": name, "amount": amount, "company": organisation, "date": date}),
            (f"Meet {name} at {clock} on {day} at {hall}.", {"name": name, "time": clock, "day": day, "place": hall}),
            (f"Receipt: {organisation}, {date}, one {goods}, {amount}.", {"company": organisation, "date": date, "item": goods, "amount": amount}),
            (f"Send the {goods} to {name} in {city}, order {order}.", {"item": goods, "name": name, "city": city, "order": order}),
            (f"{organisation} in {city} is looking for {_article(job)}; contact {mail}.", {"company": organisation, "city": city, "job": job, "email": mail}),
            (f"I would like to book a table for {count} on {day} at {clock}, name {name}.", {"guests": str(count), "day": day, "time": clock, "name": name}),
            (f"The talk is given by {name} and led by {boss}, {date}, {hall}.", {"speaker": name, "chair": boss, "date": date, "place": hall}),
            (f"{name}, {age}, {job}, {city}, {phone}.", {"name": name, "age": str(age), "job": job, "city": city, "phone": phone}),
        ]
    )  # fmt: skip


# How the fields are asked for, by language and by whether JSON is wanted.
EXTRACT_REQUESTS = {
    ("zh", True): [
        "提取{keys}，用JSON输出：{sentence}", "请用JSON格式输出{keys}：{sentence}", "从下面的句子里提取{keys}，输出JSON：{sentence}",
        "{sentence}。请把{keys}整理成JSON", "把{keys}抽取出来，格式为JSON：{sentence}", "{sentence}\n提取{keys}，返回JSON",
        "把这句话变成JSON，字段有{keys}：{sentence}", "请从文本中抽取{keys}，只输出JSON。文本：{sentence}",
        "文本：{sentence}\n任务：抽取{keys}，以JSON返回", "信息抽取：{sentence}\n字段：{keys}\n格式：JSON",
        "{sentence}——这里的{keys}是什么？用JSON回答", "读一读，然后用JSON写出{keys}：{sentence}",
        "我需要{keys}，给我JSON就行：{sentence}", "提取信息\n{sentence}\n要{keys}，json格式", "json 提取 {keys}：{sentence}",
        "请将“{sentence}”转换为JSON，包含{keys}",
    ],
    ("zh", False): [
        "提取{keys}：{sentence}", "请列出下面句子里的{keys}：{sentence}", "{sentence}。请提取{keys}", "找出{keys}：{sentence}",
        "这句话里的{keys}分别是什么：{sentence}", "从文本中抽取{keys}，一行一个：{sentence}",
        "文本：{sentence}\n请写出{keys}", "帮我把{keys}找出来：{sentence}", "信息抽取，需要{keys}：{sentence}",
    ],
    ("en", True): [
        "Extract {keys} as JSON: {sentence}", "Give me {keys} as JSON: {sentence}", "{sentence} Return {keys} as JSON.",
        "Read the sentence and output {keys} in JSON: {sentence}", "Turn this into JSON with {keys}: {sentence}",
        "Convert to JSON with the fields {keys}: {sentence}", "Text: {sentence}\nTask: extract {keys}, answer in JSON only.",
        "I need {keys} in JSON format from this: {sentence}", "json please, {keys}: {sentence}",
        "Pull {keys} out of this text and write JSON: {sentence}", "What are {keys} here? Answer as JSON. {sentence}",
        "Information extraction. Fields: {keys}. Format: JSON. Text: {sentence}", 'Make a JSON object with {keys} from "{sentence}"',
    ],
    ("en", False): [
        "Extract {keys}: {sentence}", "List {keys}: {sentence}", "{sentence} Please extract {keys}.", "Find {keys} in this sentence: {sentence}",
        "Text: {sentence}\nWrite down {keys}, one per line.", "Pull out {keys}: {sentence}", "What are {keys} in this text? {sentence}",
        "Information extraction, fields {keys}: {sentence}",
    ],
}  # fmt: skip
POLITE_REQUESTS = {
    "zh": [
        "你好，能{how}写出{keys}吗？原文：{sentence}", "麻烦{how}列出{keys}，谢谢：{sentence}", "原文如下：{sentence}。麻烦你{how}给出{keys}",
        "{keys}，请{how}列出来，内容在这里：{sentence}", "我有一段话：{sentence}。可以{how}整理出{keys}吗？", "{sentence}。能帮我{how}写一下{keys}吗？谢谢",
    ],
    "en": [
        "Hello, could you give me {keys} {how}? The text: {sentence}", "{sentence} Could you write {keys} {how}, please?",
        "Would you mind listing {keys} {how}? Thank you. {sentence}", "Here is a text: {sentence} From it I need {keys}, {how}.",
        "Please, {keys} {how}: {sentence}", "{sentence} Thanks for writing {keys} {how}.",
    ],
}  # fmt: skip


def extract_fields(rng: random.Random, split: str) -> Dialogue:
    """A sentence and the fields wanted from it -> JSON, or one line a field."""
    lang = _lang(rng)
    sentence, fields = (_zh_record if lang == "zh" else _en_record)(rng, split)
    if rng.random() < 0.3:
        fields = {key: fields[key] for key in rng.sample(list(fields), rng.randint(1, len(fields)))}
    as_json = rng.random() < 0.6
    if lang == "zh":
        keys, how = _zh_list(list(fields)), "用JSON格式" if as_json else "逐行"
        lines = [f"{key}：{value}" for key, value in fields.items()]
    else:
        keys, how = _en_list(list(fields)), "as JSON" if as_json else "one per line"
        lines = [f"{key.capitalize()}: {value}" for key, value in fields.items()]
    request = rng.choice(POLITE_REQUESTS[lang] if rng.random() < 0.25 else EXTRACT_REQUESTS[lang, as_json])
    answer = json.dumps(fields, ensure_ascii=False) if as_json else "\n".join(lines)
    return _single("extract/fields", lang, request.format(keys=keys, sentence=sentence, how=how), answer)


def extract_words(rng: random.Random, split: str) -> Dialogue:
    """All names, cities, jobs or other words of one kind in a sentence, as a short list in the order of the sentence."""
    lang = _lang(rng)
    count = rng.choice((1, 2, 2, 3))
    names = _names(rng, split, lang, max(count, 2))
    cities = _draw(rng, split, lambda: tuple(rng.sample(ZH_CITIES if lang == "zh" else EN_CITIES, count)))
    if lang == "zh":
        fruits = rng.sample(ZH_FRUITS, count)
        days = rng.choice(["昨天", "上周", "今天", "周末", "去年"])
        kind, words, sentence = rng.choice(
            [
                ("人名", names, f"{days}{_zh_list(names)}一起去了{rng.choice(ZH_CITIES)}"),
                ("人名", names, f"{_zh_list(names)}都喜欢{rng.choice(ZH_HOBBIES)}"),
                ("地名", cities, f"{names[0]}{days}去了{_zh_list(cities)}"),
                ("城市", cities, f"我们公司在{_zh_list(cities)}有办公室"),
                ("城市", cities, f"{names[0]}想去{_zh_list(cities)}旅行"),
                ("水果", fruits, f"{names[0]}在{rng.choice(ZH_CITIES)}买了{_zh_list(fruits)}"),
                ("单位", organisations := rng.sample(ZH_ORGANISATIONS, count), f"{names[0]}{days}去了{_zh_list(organisations)}办事"),
                ("物品", goods := rng.sample(ZH_GOODS, count), f"{names[0]}在商店买了{_zh_list(goods)}"),
                ("职业", jobs := rng.sample(ZH_JOBS, count), f"{names[0]}家里有{_zh_list(jobs)}"),
                ("颜色", colours := rng.sample(ZH_COLOURS, count), f"{names[0]}的画里有{_zh_list(colours)}"),
                ("爱好", hobbies := rng.sample(ZH_HOBBIES, count), f"{names[0]}周末喜欢{_zh_list(hobbies)}"),
            ]
        )  # fmt: skip
        query = rng.choice(
            [
                f"找出句子里的{kind}：{sentence}",
                f"提取{kind}：{sentence}",
                f"下面的句子里有哪些{kind}？{sentence}",
                f"“{sentence}”这句话里的{kind}有哪些？",
                f"{sentence}。请列出{kind}",
            ]
        )
        answer = rng.choice([f"{kind}：{'、'.join(words)}", f"{kind}有：{'、'.join(words)}。"])
    else:
        fruits = rng.sample(EN_FRUITS, count)
        kind, words, sentence = rng.choice(
            [
                ("names", names, f"{_en_list(names)} went to {rng.choice(EN_CITIES)} last week."),
                ("names", names, f"Yesterday {_en_list(names)} had dinner together."),
                ("cities", cities, f"{names[0]} wants to visit {_en_list(cities)}."),
                ("cities", cities, f"We have offices in {_en_list(cities)}."),
                ("fruits", fruits, f"{names[0]} bought {_en_list(fruits)} at the market in {rng.choice(EN_CITIES)}."),
                ("companies", organisations := rng.sample(EN_ORGANISATIONS, count), f"{names[0]} has worked for {_en_list(organisations)}."),
                ("jobs", jobs := rng.sample(EN_JOBS, count), f"{names[0]} has worked as {_en_list([_article(job) for job in jobs])}."),
                ("colours", colours := rng.sample(EN_COLOURS, count), f"{names[0]} painted the wall in {_en_list(colours)}."),
                ("items", goods := rng.sample(EN_GOODS, count), f"{names[0]} packed {_en_list([_article(word) for word in goods])}."),
                ("hobbies", hobbies := rng.sample(EN_HOBBIES, count), f"{names[0]} enjoys {_en_list(hobbies)} at weekends."),
            ]
        )  # fmt: skip
        query = rng.choice(
            [
                f"List the {kind}: {sentence}",
                f"Extract the {kind}: {sentence}",
                f"Which {kind} are in this sentence? {sentence}",
                f"{sentence} Find all {kind}.",
                f"Find the {kind} in this text: {sentence}",
            ]
        )
        answer = f"{kind.capitalize()}: {', '.join(words)}"
    return _single("extract/words", lang, query, answer, *words)


ZH_WORDS = [*ZH_CITIES, *ZH_JOBS, *ZH_COLOURS, *ZH_FRUITS, *ZH_FOODS, *ZH_HOBBIES, *ZH_PETS, *ZH_THINGS, *ZH_PLACES]
ZH_WORDS += [zh for zh, _ in VOCABULARY]
_TEXTS = [*ZH_WORDS, *ZH_PET_NAMES, *ZH_SURNAMES, *ZH_GIVEN, *(part for pair in ZH_FILLERS for part in pair)]
HANZI = sorted({char for text in _TEXTS for char in text if "\u4e00" <= char <= "\u9fff"})
EN_WORDS = [
    *(name for name in EN_NAMES if not is_heldout(name)),
    *EN_CITIES,
    *EN_JOBS,
    *EN_COLOURS,
    *EN_FRUITS,
    *EN_FOODS,
    *EN_HOBBIES,
    *EN_PETS,
    *EN_THINGS,
]
EN_WORDS += [en for _, en in VOCABULARY]


def _nonsense(rng: random.Random, lang: str) -> str:
    """Hanzi, words, letters or digits in any order: only looking at them helps to repeat them."""
    kind = rng.random()
    if lang == "zh" and kind < 0.4:
        return "".join(rng.choice(HANZI) for _ in range(rng.randint(2, 16)))
    if kind < 0.8:
        words = rng.choices(ZH_WORDS if lang == "zh" else EN_WORDS, k=rng.randint(2, 8))
        return ("" if lang == "zh" else " ").join(words)
    if kind < 0.9:
        return "".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(rng.randint(3, 9)))
    return "".join(rng.choice("0123456789") for _ in range(rng.randint(3, 11)))


def copy_text(rng: random.Random, split: str) -> Dialogue:
    """Repeat after me: a made-up sentence, some words, digits or plain nonsense come back unchanged."""
    lang = _lang(rng)
    nonsense = _draw(rng, split, lambda: (_nonsense(rng, lang),))[0] if rng.random() < 0.6 else ""
    if lang == "zh":
        name = _name(rng, split, "zh")
        words = rng.sample(ZH_FRUITS + ZH_THINGS + ZH_COLOURS + ZH_PETS, rng.randint(2, 4))
        text = rng.choice(
            [
                "、".join(words), " ".join(words), name, f"{name}在{rng.choice(ZH_CITIES)}{rng.choice(ZH_HOBBIES)}", f"{name}爱吃{rng.choice(ZH_FOODS)}",
                f"{rng.choice(ZH_DAYS)}去{rng.choice(ZH_CITIES)}", "".join(rng.choice("0123456789") for _ in range(rng.randint(3, 6))),
                f"{rng.choice(ZH_THINGS)}在{rng.choice(ZH_PLACES)}",
            ]
        )  # fmt: skip
        text = nonsense or text
        query = rng.choice(
            [
                f"跟我说：{text}",
                f"重复一遍：{text}",
                f"请重复：{text}",
                f"请复述“{text}”",
                f"照着念：{text}",
                f"请原样输出：{text}",
                f"跟着我念：{text}",
            ]
        )
    else:
        name = _name(rng, split, "en")
        words = rng.sample(EN_FRUITS + EN_THINGS + EN_COLOURS + EN_PETS, rng.randint(2, 4))
        text = rng.choice(
            [
                ", ".join(words), " ".join(words), name, f"{name} likes {rng.choice(EN_HOBBIES)}", f"{name} is in {rng.choice(EN_CITIES)}",
                f"{rng.choice(EN_DAYS)} in {rng.choice(EN_CITIES)}", "".join(rng.choice("0123456789") for _ in range(rng.randint(3, 6))),
                f"The {rng.choice(EN_PETS)} is {rng.choice(EN_COLOURS)}",
            ]
        )  # fmt: skip
        text = nonsense or text
        query = rng.choice(
            [
                f"Repeat after me: {text}",
                f"Say this: {text}",
                f"Please repeat: {text}",
                f'Repeat "{text}"',
                f"Say it back to me: {text}",
                f"Copy this text: {text}",
            ]
        )
    return _single("copy/text", lang, query, text)


def read_sentence(rng: random.Random, split: str) -> Dialogue:
    """A question about two people in a given text: who, where, what, or yes and no."""
    lang = _lang(rng)
    first, second = _names(rng, split, lang, 2)
    if lang == "zh":
        kind, values, ask = rng.choice(
            [
                ("住在", rng.sample(ZH_CITIES, 2), "哪里"), ("喜欢吃", rng.sample(ZH_FOODS, 2), "什么"), ("喜欢", rng.sample(ZH_HOBBIES, 2), "什么"),
                ("去了", rng.sample(ZH_CITIES, 2), "哪里"), ("买了", rng.sample(ZH_FRUITS, 2), "什么"), ("的工作是", rng.sample(ZH_JOBS, 2), "什么"),
                ("来自", rng.sample(ZH_CITIES, 2), "哪里"), ("养了一只", rng.sample(ZH_PETS, 2), "什么"), ("忘了带", rng.sample(ZH_THINGS, 2), "什么"),
                ("在学", rng.sample("游泳 画画 跳舞 下棋 摄影 滑雪 书法 英语".split(), 2), "什么"), ("最爱", rng.sample(ZH_COLOURS, 2), "什么颜色"),
                ("每天喝", rng.sample(ZH_DRINKS, 2), "什么"), ("坐在", rng.sample("第一排 第二排 窗边 门口 最后一排".split(), 2), "哪里"),
            ]
        )  # fmt: skip
        text = f"{first}{kind}{values[0]}，{second}{kind}{values[1]}。"
        person, value, other = rng.choice([(first, values[0], values[1]), (second, values[1], values[0])])
        query, answer = rng.choice(
            [
                (f"{text}{person}{kind}{ask}？", f"{person}{kind}{value}。"),
                (f"{text}谁{kind}{value}？", f"{person}{kind}{value}。"),
                (f"{text}{person}{kind}{value}吗？", f"是的，{person}{kind}{value}。"),
                (f"{text}{person}{kind}{other}吗？", f"不是，{person}{kind}{value}。"),
            ]
        )
    else:
        verb, base, values, ask = rng.choice(
            [
                ("lives in", "live in", rng.sample(EN_CITIES, 2), "Where does {} live?"), ("likes", "like", rng.sample(EN_FOODS, 2), "What does {} like?"),
                ("enjoys", "enjoy", rng.sample(EN_HOBBIES, 2), "What does {} enjoy?"), ("went to", "go to", rng.sample(EN_CITIES, 2), "Where did {} go?"),
                ("bought", "buy", rng.sample(EN_FRUITS, 2), "What did {} buy?"), ("works as a", "work as a", rng.sample([job for job in EN_JOBS if job[0] not in "aeiou"], 2), "What does {} work as?"),
                ("comes from", "come from", rng.sample(EN_CITIES, 2), "Where does {} come from?"), ("keeps a", "keep a", rng.sample(EN_PETS, 2), "What does {} keep?"),
                ("drinks", "drink", rng.sample(EN_DRINKS, 2), "What does {} drink?"), ("wears", "wear", rng.sample(EN_COLOURS, 2), "What does {} wear?"),
                ("plays the", "play the", rng.sample(EN_INSTRUMENTS, 2), "What does {} play?"),
                ("sits by the", "sit by the", rng.sample("window door stove wall stairs".split(), 2), "Where does {} sit?"),
            ]
        )  # fmt: skip
        helper = "Did" if verb in ("went to", "bought") else "Does"
        text = f"{first} {verb} {values[0]} and {second} {verb} {values[1]}. "
        person, value, other = rng.choice([(first, values[0], values[1]), (second, values[1], values[0])])
        query, answer = rng.choice(
            [
                (text + ask.format(person), f"{person} {verb} {value}."),
                (f"{text}Who {verb} {value}?", f"{person} {verb} {value}."),
                (f"{text}{helper} {person} {base} {value}?", f"Yes, {person} {verb} {value}."),
                (f"{text}{helper} {person} {base} {other}?", f"No, {person} {verb} {value}."),
            ]
        )
    return _single("reading/two", lang, query, answer)


# --- Numbers ----------------------------------------------------------------------------------------------------------


def _steps(left: int, sign: str, right: int) -> str:
    """The way to the result, tens first, where it is not in the head, e.g. "37 + 20 = 57, 57 + 5 = 62, "; else ""."""
    if sign not in "+-" or right < 10 or left < 10 or right % 10 == 0:
        return ""
    tens, units = right // 10 * 10, right % 10
    middle = left + tens if sign == "+" else left - tens
    result = left + right if sign == "+" else left - right
    return f"{left} {sign} {tens} = {middle}, {middle} {sign} {units} = {result}, "


def arithmetic(rng: random.Random, split: str) -> Dialogue:
    """Adding and subtracting within 100, the multiplication table and exact division, bare or as a tiny story."""
    lang = _lang(rng)

    def sample():
        operation = rng.choices("+-*/", (5, 5, 3, 1))[0]
        if operation in "*/":
            left, right = rng.randint(1, 9), rng.randint(1, 9)
            return (left, "*", right) if operation == "*" else (left * right, "/", right)
        most = rng.choice((10, 20, 20, 50, 100))
        left, right = rng.randint(0, most), rng.randint(0, most)
        if operation == "+":
            left, right = (left, right) if left + right <= 100 else (left // 2, right // 2)
            return left, "+", right
        return max(left, right), "-", min(left, right)

    left, sign, right = _draw(rng, split, sample)
    result = {"+": left + right, "-": left - right, "*": left * right, "/": left // right if right else 0}[sign]
    symbol = {"+": "+", "-": "-", "*": "×", "/": "÷"}[sign]
    steps = _steps(left, sign, right).replace(", ", "。" if lang == "zh" else ", ")  # "，" between digits becomes ","
    story = sign in "+-" and left and right and rng.random() < 0.3
    if lang == "zh":
        word = {"+": "加", "-": "减", "*": "乘以", "/": "除以"}[sign]
        if story:
            name, thing = _zh_name(rng), rng.choice([*ZH_FRUITS, "气球", "鸡蛋", "糖", "铅笔", "本子"])
            unit = ZH_MEASURES.get(thing, "个")
            gone = "送出" if thing in ("气球", "铅笔", "本子") else "吃了"
            if sign == "+":
                query = rng.choice(
                    [
                        f"{name}有{left}{unit}{thing}，又买了{right}{unit}，一共有多少{unit}？",
                        f"篮子里有{left}{unit}{thing}，又放进{right}{unit}，现在有几{unit}？",
                    ]
                )
                answer = f"{steps}{left}加{right}等于{result}，一共{result}{unit}。"
            else:
                query = rng.choice(
                    [
                        f"{name}有{left}{unit}{thing}，{gone}{right}{unit}，还剩几{unit}？",
                        f"盒子里有{left}{unit}{thing}，拿走{right}{unit}，还剩多少{unit}？",
                        f"{left}{unit}{thing}，送给别人{right}{unit}，还剩几{unit}？",
                    ]
                )
                answer = f"{steps}{left}减{right}等于{result}，还剩{result}{unit}。"
        else:
            query = rng.choice(
                [
                    f"{left}{word}{right}等于几？", f"{left}{word}{right}等于多少？", f"{left}{word}{right}是多少", f"{left}{symbol}{right}=", f"{left}{symbol}{right}=?",
                    f"{left} {symbol} {right} 等于多少", f"计算{left}{symbol}{right}", f"算一下{left}{word}{right}", f"请问{left}{symbol}{right}等于几？",
                    f"{left}{symbol}{right}等于多少？", f"{left}{symbol}{right}",
                ]
            )  # fmt: skip
            answer = f"{steps}{left}{word}{right}等于{result}。"
    else:
        word = {"+": "plus", "-": "minus", "*": "times", "/": "divided by"}[sign]
        if story:
            name, thing = _en_name(rng), rng.choice([*EN_FRUITS, "balloons", "eggs", "pencils", "books", "coins"])
            if sign == "+":
                query = rng.choice(
                    [
                        f"{name} has {left} {thing} and buys {right} more. How many {thing} are there now?",
                        f"There are {left} {thing} in a box. I add {right}. How many are there?",
                    ]
                )
                answer = f"{steps}{left} plus {right} is {result}, so there are {result}."
            else:
                query = rng.choice(
                    [
                        f"{name} has {left} {thing} and gives away {right}. How many are left?",
                        f"There are {left} {thing}. I take {right} away. How many are left?",
                    ]
                )
                answer = f"{steps}{left} minus {right} is {result}, so {result} are left."
        else:
            query = rng.choice(
                [
                    f"What is {left} {word} {right}?", f"{left} {word} {right}", f"How much is {left} {word} {right}?", f"Calculate {left} {symbol} {right}.",
                    f"{left} {symbol} {right} =", f"{left}{symbol}{right}=?", f"What is {left} {symbol} {right}?", f"Please compute {left} {word} {right}.",
                ]
            )  # fmt: skip
            answer = f"{steps}{'so ' * bool(steps)}{left} {word} {right} is {result}."
    return _single("arithmetic/small", lang, query, answer, f"等于{result}" if lang == "zh" else f"is {result}")


def compare_numbers(rng: random.Random, split: str) -> Dialogue:
    """Which of two or three numbers is larger or smaller."""
    lang = _lang(rng)

    def sample():
        most = rng.choice((20, 100, 1000))
        return tuple(rng.sample(range(1, most + 1), rng.choice((2, 2, 3))))

    numbers = _draw(rng, split, sample)
    large = rng.random() < 0.5
    wanted = max(numbers) if large else min(numbers)
    if lang == "zh":
        size = "大" if large else "小"
        if len(numbers) == 2:
            a, b = numbers
            query = rng.choice(
                [
                    f"{a}和{b}哪个{size}？",
                    f"{a}和{b}比，谁{size}？",
                    f"比较{a}和{b}，哪个数更{size}？",
                    f"{a}、{b}，哪个{size}一些",
                    f"{a}跟{b}哪一个比较{size}？",
                ]
            )
            answer = f"{wanted}更{size}。" if rng.random() < 0.5 else f"{wanted}比{a + b - wanted}{size}。"
        else:
            listed = "、".join(map(str, numbers))
            query = rng.choice(
                [f"{listed}里最{size}的是哪个？", f"找出最{size}的数：{listed}", f"{listed}，哪个数最{size}？"]
            )
            answer = f"最{size}的数是{wanted}。"
    else:
        more, most_word = ("larger", "largest") if large else ("smaller", "smallest")
        if rng.random() < 0.4 and large:
            more, most_word = "bigger", "biggest"
        if len(numbers) == 2:
            a, b = numbers
            query = rng.choice(
                [
                    f"Which is {more}, {a} or {b}?",
                    f"{a} or {b}, which number is {more}?",
                    f"Which number is {more}: {a} or {b}?",
                    f"Compare {a} and {b}. Which one is {more}?",
                ]
            )
            answer = f"{wanted} is {more} than {a + b - wanted}."
        else:
            listed = _en_list([str(number) for number in numbers])
            query = rng.choice(
                [
                    f"Which is the {most_word}: {listed}?",
                    f"Find the {most_word} number: {listed}",
                    f"What is the {most_word} of {listed}?",
                ]
            )
            answer = f"The {most_word} number is {wanted}."
    return _single("compare/numbers", lang, query, answer, answer.split("比")[0].split(" than")[0].rstrip("。."))


def short_list(rng: random.Random, split: str) -> Dialogue:
    """Count, reverse, pick from, or sort a list of two to five words or numbers."""
    lang = _lang(rng)
    task = rng.choice(("count", "reverse", "first", "last", "sort", "contains", "add"))
    words = ZH_FRUITS + ZH_THINGS if lang == "zh" else EN_FRUITS + EN_THINGS
    if task not in ("count", "add"):  # colours are no things to count or to buy
        words = words + (ZH_PETS + ZH_COLOURS if lang == "zh" else EN_PETS + EN_COLOURS)
    items = list(_draw(rng, split, lambda: tuple(rng.sample(words, rng.randint(2, 5)))))
    if lang == "zh":
        listed = rng.choice("、 ，").join(items)
        if task == "count":
            return _single(
                "list/count",
                lang,
                rng.choice([f"{listed}，一共有几个词？", f"数一数有几样东西：{listed}", f"下面有几个词：{listed}"]),
                f"一共{len(items)}个。",
            )
        if task == "reverse":
            query = rng.choice([f"把顺序倒过来：{listed}", f"倒着说一遍：{listed}", f"请把这些词反过来排：{listed}"])
            return _single("list/reverse", lang, query, "、".join(reversed(items)))
        if task in ("first", "last"):
            which, word = ("第一", items[0]) if task == "first" else ("最后一", items[-1])
            return _single(
                "list/" + task,
                lang,
                rng.choice(
                    [f"{listed}，{which}个是什么？", f"下面{which}个词是什么：{listed}", f"说出{which}个：{listed}"]
                ),
                f"{which}个是{word}。",
            )
        if task == "contains":
            word = rng.choice(items + words)
            answer = f"有，里面有{word}。" if word in items else f"没有，里面没有{word}。"
            return _single(
                "list/contains",
                lang,
                rng.choice([f"{listed}，里面有{word}吗？", f"清单：{listed}。有没有{word}？"]),
                answer,
            )
        if task == "add":
            new = rng.choice([word for word in words if word not in items])
            listed = "、".join(items)
            return _single(
                "list/add",
                lang,
                rng.choice([f"购物清单：{listed}。再加上{new}", f"清单是{listed}，请加上{new}"]),
                f"现在的清单：{listed}、{new}。",
            )
    else:
        listed = ", ".join(items)
        if task == "count":
            answer = f"There are {EN_NUMBERS[len(items)]}."
            return _single(
                "list/count",
                lang,
                rng.choice(
                    [
                        f"How many words are here: {listed}?",
                        f"Count the items: {listed}",
                        f"{listed}: how many things is that?",
                    ]
                ),
                answer,
            )
        if task == "reverse":
            return _single(
                "list/reverse",
                lang,
                rng.choice(
                    [
                        f"Reverse the order: {listed}",
                        f"Say these words backwards: {listed}",
                        f"Reverse this list: {listed}",
                    ]
                ),
                ", ".join(reversed(items)),
            )
        if task in ("first", "last"):
            word = items[0] if task == "first" else items[-1]
            query = rng.choice(
                [
                    f"What is the {task} word: {listed}?",
                    f"{listed}. Which one is {task}?",
                    f"Tell me the {task} item: {listed}",
                ]
            )
            return _single("list/" + task, lang, query, f'The {task} one is "{word}".')
        if task == "contains":
            word = rng.choice(items + words)
            answer = f'Yes, "{word}" is in the list.' if word in items else f'No, "{word}" is not in the list.'
            return _single(
                "list/contains",
                lang,
                rng.choice(
                    [f'Is "{word}" in this list: {listed}?', f'The list is {listed}. Does it contain "{word}"?']
                ),
                answer,
            )
        if task == "add":
            new = rng.choice([word for word in words if word not in items])
            return _single(
                "list/add",
                lang,
                rng.choice([f"My shopping list: {listed}. Add {new}.", f"The list is {listed}. Please add {new}."]),
                f"The list is now: {listed}, {new}.",
            )
    numbers = list(_draw(rng, split, lambda: tuple(rng.sample(range(1, 60), rng.randint(3, 5)))))
    if lang == "zh":
        query = rng.choice(
            [f"从小到大排列：{'、'.join(map(str, numbers))}", f"把这些数从小到大排一排：{'、'.join(map(str, numbers))}"]
        )
        return _single("list/sort", lang, query, "、".join(map(str, sorted(numbers))))
    query = rng.choice(
        [
            f"Sort from small to large: {', '.join(map(str, numbers))}",
            f"Put these numbers in order: {', '.join(map(str, numbers))}",
        ]
    )
    return _single("list/sort", lang, query, ", ".join(map(str, sorted(numbers))))


# --- Sentiment --------------------------------------------------------------------------------------------------------

# Subject: what is praised about it, what is complained about it. Each entry is (clause, the words that show it).
ZH_REVIEWS = {
    "餐厅": (
        [("菜很好吃", "好吃"), ("服务员特别热情", "热情"), ("环境干净又安静", "干净又安静"), ("上菜很快", "很快"), ("价格实惠", "实惠"), ("分量很足", "很足")],
        [("菜又咸又油", "又咸又油"), ("服务员态度很差", "态度很差"), ("环境又吵又脏", "又吵又脏"), ("等了一个小时才上菜", "等了一个小时"), ("价格太贵", "太贵"), ("分量少得可怜", "少得可怜")],
    ),
    "手机": (
        [("拍照很清晰", "清晰"), ("电池很耐用", "耐用"), ("运行流畅", "流畅"), ("屏幕漂亮", "漂亮"), ("手感很好", "很好"), ("充电特别快", "特别快")],
        [("拍照模糊", "模糊"), ("电池半天就没电", "没电"), ("用着总是卡", "总是卡"), ("屏幕有划痕", "划痕"), ("发烫得厉害", "发烫"), ("信号很差", "很差")],
    ),
    "衣服": (
        [("面料柔软舒服", "柔软舒服"), ("颜色和图片一样好看", "好看"), ("做工精细", "精细"), ("穿着很显瘦", "显瘦"), ("尺码很合适", "合适")],
        [("面料又硬又扎", "又硬又扎"), ("洗一次就掉色", "掉色"), ("线头很多，做工粗糙", "粗糙"), ("尺码不准，太小了", "不准"), ("和图片差太多", "差太多")],
    ),
    "酒店": (
        [("房间干净", "干净"), ("床很舒服", "舒服"), ("前台很热心", "热心"), ("离地铁站很近", "很近"), ("早餐丰富", "丰富")],
        [("房间有异味", "异味"), ("隔音太差，一夜没睡好", "太差"), ("前台爱理不理", "爱理不理"), ("位置偏僻不好找", "偏僻"), ("早餐难吃", "难吃")],
    ),
    "电影": (
        [("剧情精彩", "精彩"), ("演员演得很自然", "很自然"), ("音乐动人", "动人"), ("看得我感动落泪", "感动"), ("画面很美", "很美")],
        [("剧情无聊", "无聊"), ("演员演得太假", "太假"), ("看得我直打瞌睡", "打瞌睡"), ("结尾莫名其妙", "莫名其妙"), ("浪费时间", "浪费")],
    ),
    "书": (
        [("故事吸引人", "吸引人"), ("内容很有用", "有用"), ("语言优美", "优美"), ("让我学到很多", "学到很多"), ("印刷清楚", "清楚")],
        [("故事拖沓", "拖沓"), ("内容空洞", "空洞"), ("错别字很多", "错别字"), ("读不下去", "读不下去"), ("纸张太薄", "太薄")],
    ),
    "快递": (
        [("送货很快", "很快"), ("包装完好", "完好"), ("快递员很有礼貌", "有礼貌"), ("当天就收到了", "当天就收到")],
        [("送货太慢", "太慢"), ("包装都破了", "破了"), ("快递员态度恶劣", "恶劣"), ("东西送错了", "送错")],
    ),
    "软件": (
        [("界面简单清楚", "简单清楚"), ("广告很少", "很少"), ("打开很快", "很快"), ("功能齐全", "齐全"), ("更新及时", "及时"), ("客服回复很耐心", "耐心")],
        [("界面乱七八糟", "乱七八糟"), ("广告多得烦人", "烦人"), ("打开就闪退", "闪退"), ("功能还要另外收费", "另外收费"), ("登录总是失败", "失败"), ("客服只会复制粘贴", "复制粘贴")],
    ),
    "课程": (
        [("老师讲得清楚", "清楚"), ("例子很多，一听就懂", "一听就懂"), ("作业都有批改", "都有批改"), ("节奏刚刚好", "刚刚好"), ("学完真的会用", "真的会用")],
        [("老师照着稿子念", "照着稿子念"), ("例子太旧", "太旧"), ("作业没人改", "没人改"), ("节奏太快，完全跟不上", "跟不上"), ("学完什么也没记住", "什么也没记住")],
    ),
    "出租车": (
        [("司机很有礼貌", "有礼貌"), ("车里干净没有味道", "干净"), ("开得又稳又安全", "又稳又安全"), ("等了两分钟就来了", "两分钟"), ("收费合理", "合理")],
        [("司机一路骂人", "骂人"), ("车里烟味很重", "烟味"), ("开得又急又猛，晃得我想吐", "想吐"), ("等了四十分钟", "等了四十分钟"), ("故意绕路", "绕路")],
    ),
    "牙刷": (
        [("刷毛柔软不伤牙龈", "柔软"), ("握着很舒服", "舒服"), ("续航一个月", "续航一个月"), ("刷得很干净", "很干净"), ("声音很小", "很小")],
        [("刷毛太硬，牙龈出血", "出血"), ("握着打滑", "打滑"), ("续航只有两天", "只有两天"), ("刷得不干净", "不干净"), ("震得手发麻", "发麻")],
    ),
    "水果": (
        [("吃着很甜", "很甜"), ("个个新鲜", "新鲜"), ("汁水很足", "很足"), ("包装很用心", "很用心"), ("比超市便宜", "便宜")],
        [("吃着又酸又涩", "又酸又涩"), ("个个发蔫", "发蔫"), ("汁水很少", "很少"), ("分量不够，少了一斤", "少了一斤"), ("比超市还贵", "还贵")],
    ),
    "耳机": (
        [("音质清晰", "清晰"), ("戴着很轻", "很轻"), ("连接稳定", "稳定"), ("降噪效果好", "效果好"), ("一天充一次就够", "就够")],
        [("音质沙沙的", "沙沙的"), ("戴久了耳朵疼", "耳朵疼"), ("连接老是断", "老是断"), ("左边没有声音", "没有声音"), ("用了一周就坏了", "就坏了")],
    ),
    "博物馆": (
        [("展品丰富", "丰富"), ("讲解生动有趣", "生动有趣"), ("工作人员很热心", "热心"), ("展厅宽敞明亮", "宽敞明亮"), ("免费还能寄存行李", "免费")],
        [("展品太少", "太少"), ("讲解机坏了没人管", "没人管"), ("工作人员爱理不理", "爱理不理"), ("排队两个小时", "排队两个小时"), ("展厅太暗看不清", "看不清")],
    ),
}  # fmt: skip
EN_REVIEWS = {
    "restaurant": (
        [("the food was delicious", "delicious"), ("the waiters were friendly", "friendly"), ("the place was clean and quiet", "clean and quiet"), ("the prices are fair", "fair"), ("our meal came quickly", "quickly")],
        [("the food was cold", "cold"), ("the waiters were rude", "rude"), ("the place was dirty and loud", "dirty and loud"), ("the prices are far too high", "too high"), ("we waited for an hour", "waited for an hour")],
    ),
    "phone": (
        [("the camera is excellent", "excellent"), ("the battery lasts two days", "lasts two days"), ("it runs fast", "fast"), ("the screen is beautiful", "beautiful"), ("it feels great in the hand", "great")],
        [("the pictures are blurry", "blurry"), ("the battery dies after two hours", "dies"), ("it is painfully slow", "slow"), ("the screen was scratched", "scratched"), ("it gets too hot", "too hot")],
    ),
    "hotel": (
        [("the room was spotless", "spotless"), ("the bed was comfortable", "comfortable"), ("the staff were helpful", "helpful"), ("breakfast was wonderful", "wonderful"), ("the view was lovely", "lovely")],
        [("the room smelled bad", "smelled bad"), ("the bed was broken", "broken"), ("the staff ignored us", "ignored us"), ("breakfast was awful", "awful"), ("the noise kept us awake", "kept us awake")],
    ),
    "film": (
        [("the story is gripping", "gripping"), ("the acting is superb", "superb"), ("the music is beautiful", "beautiful"), ("I laughed the whole time", "laughed"), ("the ending is perfect", "perfect")],
        [("the story is boring", "boring"), ("the acting is terrible", "terrible"), ("the music is annoying", "annoying"), ("I almost fell asleep", "fell asleep"), ("the ending makes no sense", "no sense")],
    ),
    "jacket": (
        [("the fabric is soft", "soft"), ("it fits perfectly", "perfectly"), ("the colour is gorgeous", "gorgeous"), ("it keeps me warm", "keeps me warm"), ("the quality is great", "great")],
        [("the fabric is scratchy", "scratchy"), ("it does not fit at all", "does not fit"), ("the colour faded after one wash", "faded"), ("the zip broke on the first day", "broke"), ("the quality is poor", "poor")],
    ),
    "book": (
        [("I could not put it down", "could not put it down"), ("the characters are charming", "charming"), ("it taught me a lot", "taught me a lot"), ("the writing is elegant", "elegant")],
        [("I gave up after ten pages", "gave up"), ("the characters are flat", "flat"), ("it was a waste of time", "waste of time"), ("the writing is clumsy", "clumsy")],
    ),
    "app": (
        [("the layout is clear", "clear"), ("it opens in a second", "opens in a second"), ("adverts are rare", "rare"), ("every update brings something useful", "useful"), ("support answered politely", "politely")],
        [("the layout is confusing", "confusing"), ("it crashes all the time", "crashes"), ("adverts pop up everywhere", "pop up everywhere"), ("the update deleted my notes", "deleted my notes"), ("support never answered", "never answered")],
    ),
    "course": (
        [("the teacher explains everything well", "explains everything well"), ("I could use it at once", "could use it at once"), ("our homework was corrected carefully", "corrected carefully"), ("lessons have the right length", "right length")],
        [("the teacher just reads his slides", "just reads his slides"), ("I learned nothing new", "nothing new"), ("our homework was never corrected", "never corrected"), ("lessons are far too fast", "too fast")],
    ),
    "taxi": (
        [("the driver was polite", "polite"), ("it came within three minutes", "within three minutes"), ("he drove calmly", "calmly"), ("our car was spotless", "spotless"), ("the fare was fair", "fair")],
        [("the driver shouted at us", "shouted at us"), ("it came forty minutes late", "late"), ("he took a long detour", "detour"), ("our car smelled of smoke", "smelled of smoke"), ("the fare was far too high", "too high")],
    ),
    "toothbrush": (
        [("its bristles are soft", "soft"), ("one charge lasts a month", "lasts a month"), ("my teeth feel clean", "clean"), ("the motor is quiet", "quiet")],
        [("its bristles hurt my gums", "hurt my gums"), ("one charge lasts a single day", "a single day"), ("my teeth still feel rough", "still feel rough"), ("the motor is far too loud", "too loud")],
    ),
    "fruit": (
        [("it was sweet and juicy", "sweet and juicy"), ("every piece was fresh", "fresh"), ("it came packed with great care", "great care"), ("it costs less than in the shop", "costs less")],
        [("it was sour and hard", "sour and hard"), ("every piece was rotten", "rotten"), ("it came packed badly and crushed", "crushed"), ("two apples were missing", "missing")],
    ),
    "headphones": (
        [("the sound is rich", "rich"), ("they feel light", "light"), ("bluetooth connects at once", "connects at once"), ("noise stays outside", "stays outside")],
        [("the sound crackles", "crackles"), ("my ears hurt after an hour", "hurt"), ("bluetooth keeps dropping out", "dropping out"), ("one side went silent in a week", "went silent")],
    ),
    "museum": (
        [("the exhibits are wonderful", "wonderful"), ("our guide told great stories", "great stories"), ("the halls are bright", "bright"), ("kids can touch things", "can touch things")],
        [("the exhibits are dull", "dull"), ("our guide mumbled", "mumbled"), ("the halls were dark and hot", "dark and hot"), ("we queued for two hours", "two hours")],
    ),
}  # fmt: skip
ZH_OPENINGS = {
    "餐厅": ["这家餐厅", "这次"], "酒店": ["这家酒店", "这次"], "手机": ["这部手机"], "电影": ["这部电影"], "书": ["这本书"], "衣服": ["这件衣服"], "快递": [],
    "软件": ["这个软件"], "课程": ["这门课程"], "出租车": ["这次打车，"], "牙刷": ["这支牙刷"], "水果": ["这次的水果"], "耳机": ["这副耳机"], "博物馆": ["这家博物馆"],
}  # fmt: skip
ZH_ENDINGS = {
    True: ["", "，下次还来", "，很满意", "，推荐给大家", "，值得", "，给个好评"],
    False: ["", "，再也不来了", "，很失望", "，不推荐", "，想退货", "，后悔了"],
}
EN_ENDINGS = {
    True: ["", " I would recommend it.", " Very happy.", " Five stars!", " I will come back."],
    False: ["", " I want my money back.", " Very disappointed.", " Never again.", " One star."],
}


def sentiment(rng: random.Random, split: str) -> Dialogue:
    """Whether a review of one or two clauses is positive, negative or mixed, and the words that show it."""
    lang = _lang(rng)
    reviews, same = (ZH_REVIEWS, 2) if lang == "zh" else (EN_REVIEWS, 7)  # clauses about one thing start alike

    def sample():
        good, bad = reviews[subject]
        mood = rng.choice(("good", "good", "bad", "bad", "mixed"))
        if mood == "mixed":
            praise = rng.choice(good)
            return (mood, praise, rng.choice([clause for clause in bad if clause[0][:same] != praise[0][:same]]))
        return (mood, *rng.sample(good if mood == "good" else bad, rng.choice((1, 2, 2))))

    subject = rng.choice(list(reviews))
    mood, *clauses = _draw(rng, split, sample)
    words = [word for _, word in clauses]
    if lang == "zh":
        joined = ("，但是" if mood == "mixed" else "，").join(text for text, _ in clauses)
        opening = rng.choice(["", *ZH_OPENINGS[subject]])
        review = opening + joined + (rng.choice(ZH_ENDINGS[mood == "good"]) if mood != "mixed" else "")
        query = rng.choice(
            [
                f"这条评论是正面的还是负面的？{review}", f"判断情感：{review}", f"下面的评价是好评还是差评？{review}", f"“{review}”是好评还是差评？",
                f"请判断这句话的情感倾向：{review}", f"{review}。这是好评还是差评？", f"情感分类：{review}", f"这句评论是积极的还是消极的：{review}",
                f"这位顾客满意吗？{review}", f"“{review}”，说话的人满意还是不满意？", f"评论：{review}\n情感：", f"帮我看看这条评价是夸还是骂：{review}",
                f"下面的话是表扬还是批评？{review}", f"{review} 属于正面还是负面", f"情感分析 {review}",
            ]
        )  # fmt: skip
        shown = "和".join(f"“{word}”" for word in words)
        answer = {"good": f"正面，是好评。{shown}都是夸奖。" if len(words) > 1 else f"正面，是好评。{shown}是夸奖。",
                  "bad": f"负面，是差评。{shown}说明不满意。",
                  "mixed": f"有好有坏：“{words[0]}”是优点，“{words[-1]}”是缺点。"}[mood]  # fmt: skip
    else:
        joined = (", but " if mood == "mixed" else " and ").join(text for text, _ in clauses)
        review = (
            joined[0].upper() + joined[1:] + "." + (rng.choice(EN_ENDINGS[mood == "good"]) if mood != "mixed" else "")
        )
        query = rng.choice(
            [
                f"Is this review positive or negative? {review}", f"Positive or negative: {review}", f"What is the sentiment of this review? {review}",
                f"{review} Is that a good or a bad review?", f"Classify the sentiment: {review}", f"Tell me if this is positive or negative: {review}",
                f'"{review}" Is the customer happy?',
                f"Review: {review} Sentiment?", f"Does the writer like it? {review}", f"Praise or complaint? {review}", f"{review} Positive, negative or mixed?",
                f"sentiment: {review}", f'How does the customer feel? "{review}"',
            ]
        )  # fmt: skip
        shown = " and ".join(f'"{word}"' for word in words)
        answer = {"good": f"Positive. The writer is happy: {shown}.",
                  "bad": f"Negative. The writer is unhappy: {shown}.",
                  "mixed": f'Mixed. "{words[0]}" is praise, but "{words[-1]}" is a complaint.'}[mood]  # fmt: skip
    return _single("sentiment/review", lang, query, answer, re.split("[，：.]", answer)[0])


# --- Advertising copy -------------------------------------------------------------------------------------------------

ZH_COPY = {
    "材质": {
        "棉": "亲肤的棉质面料，柔软透气", "牛仔布": "结实的牛仔布，耐穿有型", "雪纺": "轻盈的雪纺面料，飘逸灵动", "针织": "柔软的针织面料，贴身不紧绷",
        "羊毛": "细腻的羊毛，保暖又轻柔", "蕾丝": "精致的蕾丝，尽显柔美", "亚麻": "天然的亚麻，清爽透气", "真丝": "顺滑的真丝，光泽动人",
        "皮革": "硬朗的皮革，帅气十足", "丝绒": "细腻的丝绒，质感高级", "毛呢": "厚实的毛呢，挺括保暖", "灯芯绒": "温暖的灯芯绒，纹理清晰",
        "羊绒": "柔软的羊绒，轻暖贴心", "法兰绒": "绵密的法兰绒，摸着就暖和", "速干面料": "速干的面料，出汗也清爽", "天丝": "垂顺的天丝，凉滑舒适",
        "网纱": "轻薄的网纱，层层飘逸", "羽绒": "蓬松的羽绒，轻便御寒", "莫代尔": "细滑的莫代尔，像第二层皮肤", "棉麻": "透气的棉麻，自然舒展",
    },
    "风格": {
        "清新": "清新的风格，像一阵微风", "复古": "复古的味道，耐人寻味", "休闲": "休闲的设计，轻松自在", "甜美": "甜美的气质，减龄可爱",
        "优雅": "优雅的气息，端庄大方", "简约": "简约的线条，百搭不挑人", "运动": "运动的元素，充满活力", "文艺": "文艺的气质，安静美好",
        "通勤": "通勤的款式，得体干练", "街头": "街头的感觉，个性十足", "浪漫": "浪漫的气息，令人心动", "学院": "学院的风格，青春洋溢",
        "田园": "田园的风格，像走进花海", "商务": "商务的款式，稳重得体", "中国风": "中国风的设计，古韵悠长", "潮流": "潮流的设计，走在前面",
        "度假": "度假的感觉，像吹着海风", "英伦": "英伦的格调，绅士十足", "森系": "森系的气息，自然清新", "酷感": "酷酷的样子，回头率高",
    },
    "图案": {
        "碎花": "细碎的花朵点缀其间", "条纹": "经典的条纹修饰身形", "格子": "格子图案经典耐看", "波点": "俏皮的波点活泼可爱", "刺绣": "精美的刺绣见证用心",
        "印花": "别致的印花吸引目光", "字母": "醒目的字母增添个性", "卡通": "可爱的卡通图案充满童趣", "纯色": "干净的纯色简单大方",
        "小花": "小花朵朵，温柔可爱", "豹纹": "野性的豹纹，气场十足", "拼色": "撞色拼接，层次分明", "手绘": "手绘的图案，独一无二", "渐变": "渐变的色彩，像天边的晚霞", "雪花": "点点雪花，满是冬日气息",
    },
    "版型": {
        "宽松": "宽松的版型遮肉显瘦，行动自如", "修身": "修身的剪裁勾勒曲线", "直筒": "直筒的版型不挑身材", "显瘦": "显瘦的剪裁修饰身形", "短款": "短款的设计拉长比例", "收腰": "收腰的设计突出腰线",
        "a字": "a字的轮廓遮住小肚子", "长款": "长款的设计气场十足", "h型": "h型的廓形利落大方", "微喇": "微喇的线条拉长小腿",
    },
    "领型": {"圆领": "圆领简洁舒适", "v领": "v领拉长颈部线条", "高领": "高领保暖又有型", "方领": "方领露出优美锁骨", "娃娃领": "娃娃领甜美乖巧", "翻领": "翻领显得精神", "一字领": "一字领露出优美肩线", "立领": "立领挺括有型", "连帽": "连帽的设计挡风又减龄"},
    "袖长": {"长袖": "长袖温暖贴心", "短袖": "短袖清凉利落", "无袖": "无袖清爽干净", "七分袖": "七分袖露出纤细手腕", "五分袖": "五分袖遮住手臂", "泡泡袖": "泡泡袖俏皮可爱", "九分袖": "九分袖利落清爽"},
    "腰型": {"高腰": "高腰设计拉长双腿", "中腰": "中腰设计舒适自然", "松紧腰": "松紧腰穿脱方便", "自然腰": "自然腰线自在不束缚", "系带腰": "系带的腰型收放随心"},
    "细节": {
        "口袋": "大大的口袋，装下手机和钥匙", "木扣": "温润的木扣，质朴耐看", "抽绳": "抽绳可以随意松紧", "荷叶边": "灵动的荷叶边，走路带风", "拼接": "巧妙的拼接，别出心裁", "开衩": "侧边的开衩，行动自如", "拉链": "顺滑的拉链，穿脱方便",
    },
}  # fmt: skip
ZH_GARMENTS = {
    "裙": (
        ["连衣裙", "长裙", "衬衫裙", "公主裙", "背带裙", "百褶裙"],
        ["材质", "风格", "图案", "版型", "领型", "袖长", "腰型", "细节"],
        "裙型",
    ),
    "上衣": (
        ["衬衫", "T恤", "卫衣", "毛衣", "外套", "夹克", "开衫"],
        ["材质", "风格", "图案", "版型", "领型", "袖长", "细节"],
        "衣样式",
    ),
    "裤": (
        ["阔腿裤", "直筒裤", "喇叭裤", "短裤", "休闲裤", "小脚裤"],
        ["材质", "风格", "图案", "版型", "腰型", "细节"],
        "裤型",
    ),
}
ZH_AD_ENDINGS = [
    "日常出门、约会都合适。", "穿上它，每天都有好心情。", "怎么搭都好看。", "值得放进你的衣橱。", "这个季节就穿它吧。", "简单一搭，就很出彩。", "舒服又好看，让人爱不释手。",
    "无论上班还是逛街都很合适。",
    "送自己，也送闺蜜。", "随手一搭，就是一道风景。", "从早到晚都自在。", "越穿越喜欢。", "镜子里的你，自己都会多看一眼。", "一件单品，几种心情。",
]  # fmt: skip
EN_PRODUCTS = {
    "backpack": ("for school, work and weekend trips", ["canvas", "nylon", "leather"]),
    "jacket": ("for windy days and evening walks", ["cotton", "wool", "denim", "leather"]),
    "lamp": ("for your desk or bedside", ["metal", "wood", "glass"]),
    "mug": ("for your morning coffee or tea", ["ceramic", "glass", "steel"]),
    "scarf": ("for cold mornings", ["wool", "silk", "cotton"]),
    "dress": ("for parties and sunny afternoons", ["cotton", "silk", "linen"]),
    "chair": ("for reading and long talks", ["wood", "metal", "rattan"]),
    "water bottle": ("for the gym and the road", ["steel", "glass", "plastic"]),
    "notebook": ("for plans, lists and ideas", ["paper", "leather", "cork"]),
    "rug": ("for a cosy living room", ["wool", "cotton", "jute"]),
    "umbrella": ("for rainy walks", ["nylon", "cotton", "silk"]),
    "tent": ("for nights under the stars", ["nylon", "canvas", "cotton"]),
    "pillow": ("for calm and deep sleep", ["cotton", "linen", "silk"]),
    "clock": ("for the kitchen or the bedside", ["wood", "metal", "glass"]),
    "teapot": ("for long talks with friends", ["ceramic", "glass", "iron"]),
    "blanket": ("for film nights on the sofa", ["wool", "cotton", "fleece"]),
    "wallet": ("for coins, cards and tickets", ["leather", "canvas", "cork"]),
    "helmet": ("for safe rides through town", ["plastic", "carbon", "foam"]),
    "toy train": ("for small hands and big dreams", ["wood", "metal", "plastic"]),
    "apron": ("for cooks and painters", ["cotton", "linen", "denim"]),
}  # fmt: skip
EN_FEATURES = {
    "light": "so light that you forget you carry it", "waterproof": "waterproof, so rain is no problem", "foldable": "foldable and easy to store",
    "handmade": "handmade with care", "easy to clean": "easy to clean", "soft": "soft to the touch", "strong": "strong enough for daily use", "elegant": "elegant in every detail",
    "recycled": "made to be kind to the planet", "long-lasting": "built to last for years", "compact": "compact and easy to put away",
    "well-made": "well made down to the last detail", "affordable": "kind to your budget", "stylish": "stylish without trying too hard",
    "original": "unlike any other you have seen", "popular": "loved by all who own one",
}  # fmt: skip


def advert(rng: random.Random, split: str) -> Dialogue:
    """Attributes of a product -> one to three sentences that use all of them."""
    if _lang(rng) == "en":
        return _english_advert(rng, split)

    def sample():
        garment = rng.choice(list(ZH_GARMENTS))
        shapes, keys, shape_key = ZH_GARMENTS[garment]
        chosen = rng.sample(keys, rng.randint(1, 3))
        unfit = {
            "裤": ("短款", "收腰", "a字", "网纱", "荷叶边", "开衩"),
            "裙": ("短款", "微喇", "羽绒"),
            "上衣": ("a字", "微喇"),
        }[garment]
        return (
            garment,
            shape_key,
            rng.choice(shapes),
            rng.choice(ZH_COLOURS),
            *((key, rng.choice([value for value in ZH_COPY[key] if value not in unfit])) for key in chosen),
        )

    garment, shape_key, shape, colour, *features = _draw(rng, split, sample)
    prefix = {"裙": "裙", "上衣": "衣", "裤": "裤"}[garment]
    attributes = [f"{prefix if key in ('领型', '袖长', '腰型') else ''}{key}#{value}" for key, value in features]
    attributes += [f"颜色#{colour}", f"{shape_key}#{shape}"]
    rng.shuffle(attributes)
    listed = "*".join([f"类型#{garment}", *attributes])
    query = rng.choice(
        [
            listed, listed, f"根据下面的属性写一段广告文案：{listed}", f"请为这件商品写一段推荐语：{listed}", f"{listed} 写一段宣传语", f"写一段电商文案：{listed}",
            f"帮我写几句广告：{listed}", f"商品信息：{listed}。请写一段介绍",
            f"{listed}\n请写一段卖点介绍", f"用这些属性写广告词：{listed}", f"帮网店写商品描述，属性：{listed}", f"文案：{listed}",
        ]
    )  # fmt: skip
    parts = [ZH_COPY[key][value] for key, value in features]
    measure = "件" if garment == "上衣" else "条"
    opening = rng.choice([f"这款{colour}的{shape}，", f"一{measure}{colour}{shape}，", f"{colour}的{shape}，"])
    rest = "，".join(parts[1:]) + "。" if len(parts) > 1 else ""
    return _single(
        "attr/copy", "zh", query, f"{opening}{parts[0]}。{rest}{rng.choice(ZH_AD_ENDINGS)}", colour, shape, *parts
    )


def _english_advert(rng: random.Random, split: str) -> Dialogue:
    def sample():
        product = rng.choice(list(EN_PRODUCTS))
        return product, rng.choice(EN_COLOURS), rng.choice(EN_PRODUCTS[product][1]), rng.choice(list(EN_FEATURES))

    product, colour, material, feature = _draw(rng, split, sample)
    listed = rng.choice(
        [
            f"product: {product}; colour: {colour}; material: {material}; feature: {feature}",
            f"{product}, {colour}, {material}, {feature}",
            f"type#{product}*colour#{colour}*material#{material}*feature#{feature}",
        ]
    )
    query = rng.choice(
        [
            f"Write an ad. {listed}",
            f"Write a short advertisement: {listed}",
            f"Make advertising copy from these attributes: {listed}",
            f"Help me sell this: {listed}",
        ]
    )
    purpose = EN_PRODUCTS[product][0]
    answer = rng.choice(
        [
            f"Meet our {colour} {product}, made of {material}. It is {EN_FEATURES[feature]}, and just right {purpose}.",
            f"This {colour} {material} {product} is {EN_FEATURES[feature]}. A good choice {purpose}.",
            f"Looking for {_article(product)}? Ours comes in {colour} and is made of {material}. It is {EN_FEATURES[feature]}, perfect {purpose}.",
        ]
    )
    return _single("attr/copy", "en", query, answer, product, colour, material, EN_FEATURES[feature])


# --- Honest ignorance -------------------------------------------------------------------------------------------------

ZH_COMPANIES = "腾讯 阿里巴巴 百度 京东 小米 华为 比亚迪 美团 网易 苹果公司 特斯拉 微软 茅台 中国移动 联想 格力 海尔 谷歌 亚马逊 三星".split()
EN_COMPANIES = "Apple Microsoft Tesla Amazon Google Nvidia Intel Toyota Sony Samsung Nike Disney Boeing Pfizer Siemens Nestle Adidas Netflix Starbucks".split()
ZH_SPORTS = "足球 篮球 排球 乒乓球 羽毛球 网球 冰球 游泳 田径 围棋".split()
EN_SPORTS = "football basketball volleyball tennis hockey baseball rugby cricket swimming chess".split()
ZH_TIMES = "今天 明天 后天 现在 今晚 这周 周末 明天早上 下周".split()
ZH_TITLES = "医生 老师 导演 律师 作家 画家 歌手 院士 校长 教练 主任".split()
EN_TITLES = "Doctor Captain Director Judge Coach Painter Mr. Ms. Dr. Pastor Senator".split()
ZH_OWN = (
    "银行卡余额 话费 快递 工资 体检报告 考试成绩 邮箱密码 微信消息 步数 血压 网络账单 水费 通话记录 聊天记录 积分 存款 "
    "排队号码 流量 信用卡账单 体重 取件码 视力 订单"
).split()
EN_OWN = (
    "account balance|phone bill|package|salary|test results|email password|messages|step count|blood pressure|internet bill|water bill|"
    "call history|order status|loyalty points|savings|queue number|data usage|credit card bill|weight|pickup code|inbox|calendar"
).split("|")
EN_TIMES = ["today", "tomorrow", "right now", "tonight", "this week", "at the weekend", "next week", "tomorrow morning"]


def honest_ignorance(rng: random.Random, split: str) -> Dialogue:
    """Weather, prices, results, people, made-up books and things, and the user's own data, which an offline model cannot
    know, and numbers too large for it: it says so, and often names what was asked.
    """
    lang = _lang(rng)
    large, larger = _draw(rng, split, lambda: (rng.randint(1200, 99999), rng.randint(1200, 99999)))
    (code,) = _draw(
        rng, split, lambda: (rng.choice("GDKTZACM") + rng.choice(["", "A", "U"]) + str(rng.randint(10, 9999)),)
    )
    if lang == "zh":
        city, when = _draw(rng, split, lambda: (rng.choice(ZH_CITIES), rng.choice(ZH_TIMES)))
        company, sport = _draw(rng, split, lambda: (rng.choice(ZH_COMPANIES), rng.choice(ZH_SPORTS)))
        name, relative, year = _name(rng, split, "zh"), rng.choice(ZH_RELATIVES), rng.randint(2024, 2045)
        title, own, other = rng.choice(ZH_TITLES), rng.choice(ZH_OWN), rng.choice(ZH_FRUITS + ZH_THINGS)
        (thing,) = _draw(rng, split, lambda: (_made_up("", "zh", rng),))
        (work,) = _draw(
            rng, split, lambda: (rng.choice(["", "", f"{rng.choice(ZH_WORDS)}的"]) + _made_up("", "zh", rng),)
        )
        questions, answers = rng.choice(
            [
                ([f"{city}{when}天气怎么样？", f"{when}{city}会下雨吗？", f"{city}{when}多少度？", f"{when}{city}冷不冷？", f"{city}的天气如何", f"告诉我{city}{when}的天气", f"{when}去{city}要带伞吗？"],
                 [f"我不能联网，查不到{city}的天气。请看手机上的天气软件。", f"抱歉，我看不到{city}的天气预报，请查一下天气软件。", f"{city}的天气我不知道，因为我没有联网。"]),
                ([f"{company}的股价是多少？", f"{company}今天股价涨了吗？", f"{company}的股票能买吗？", f"帮我看看{company}的股价", f"{company}现在市值多少？"],
                 [f"我不能联网，看不到{company}的股价，请查行情软件。", f"{company}的行情我不知道，投资要谨慎，请看正规的行情软件。"]),
                ([f"昨天的{sport}比赛谁赢了？", f"{year}年{sport}冠军是谁？", f"今年的{sport}比赛结果怎么样？", f"{sport}世界冠军现在是谁？"],
                 [f"我没有联网，不知道{sport}比赛的结果，请看体育新闻。", f"{sport}比赛的结果我不知道，可以查一查体育网站。"]),
                ([f"{city}今天有什么新闻？", f"{city}最近发生了什么？", f"说说{city}的最新消息", f"{when}{city}有什么大事？"],
                 [f"我不能联网，没有{city}的新闻，请看新闻网站。", f"{city}最近的事我不知道，我没有新闻来源。"]),
                ([f"你认识{name}吗？", f"{name}是谁？", f"介绍一下{name}", f"{name}多大了？", f"{name}的电话是多少？", f"{name}住在哪里？"],
                 [f"我不认识{name}，没有学过关于他的内容。" if rng.random() < 0.3 else f"我不认识{name}，所以答不上来。", f"抱歉，我不知道{name}是谁。", f"{name}这个人我不了解，不敢乱说。"]),
                ([f"从{city}到北京的火车几点开？", f"{when}{city}有票吗？", f"去{city}的机票多少钱？", f"{city}的航班晚点了吗？"],
                 [f"我查不到{city}的车次和票价，请用官方的购票软件。", f"我不能联网，{city}的票务信息请查官方网站。"]),
                ([f"{city}的房价是多少？", f"{city}房租贵吗？", f"{city}哪家饭店最好吃？", f"{city}有多少人？"],
                 [f"我不清楚{city}的具体情况，请查最新的资料。", f"{city}的这类信息我不知道，我没有联网。"]),
                ([f"我{relative}现在在干什么？", f"我{relative}今天心情好吗？", f"我{relative}昨天吃了什么？"],
                 [f"我不知道你{relative}的情况，可以直接问问。", f"我看不到你{relative}在做什么，打个电话问问吧。"]),
                ([f"{company}的老板是谁？", f"{company}有多少员工？", f"{company}最近有什么新产品？", f"{company}哪年成立的？"],
                 [f"{company}的情况我没有学过，不敢乱说，请查官方网站。", f"我不知道{company}的最新情况，因为我没有联网。"]),
                ([f"{year}年会发生什么？", f"{year}年的春节是哪一天？", f"{year}年房价会涨吗？", f"{year}年世界会怎样？"],
                 [f"{year}年的事我不知道，没法回答。", f"我预测不了{year}年的事情。"]),
                ([f"{city}{when}刮不刮风？", f"{when}{city}会降温吗", f"{city}下雪没有", f"{when}适合去{city}爬山吗？", f"{city}{when}太阳大不大？", f"{when}在{city}要穿羽绒服吗？"],
                 [f"我不能联网，查不到{city}的天气。请看手机上的天气软件。", f"{city}的天气我不知道，因为我没有联网。"]),
                ([f"《{work}》的作者是谁？", f"《{work}》讲了什么故事？", f"你看过《{work}》吗？", f"《{work}》是哪年的作品？", f"谁演了《{work}》？", f"《{work}》好看吗"],
                 [f"我没有学过《{work}》，不知道它的内容，不敢乱说。", f"抱歉，《{work}》我不了解，请查一下资料。"]),
                ([f"{code}次列车几点到？", f"航班{code}起飞了吗？", f"快递单号{code}到哪儿了？", f"{code}还有票吗？", f"帮我看看{code}的状态"],
                 [f"我不能联网，查不到{code}的信息，请看官方的网站或软件。", f"{code}的情况我不知道，请到官方软件里查一查。"]),
                ([f"我的{own}是多少？", f"帮我查一下{own}", f"看看我的{own}", f"我的{own}怎么样了？", f"你知道我的{own}吗？"],
                 [f"我看不到你的{own}，请在手机或相关的软件里查看。", f"你的{own}我不知道，我没有这些资料。"]),
                ([f"{large}乘以{larger}等于多少？", f"{large}×{larger}=", f"帮我算{large}乘{larger}", f"{large}除以{larger}是多少", f"{larger}的平方根乘{large}是多少？"],
                 [f"{large}这样大的数我算不准，请用计算器。", "这么大的数我算不准。请用手机上的计算器，又快又准。"]),
                ([f"{name}{title}是哪里人？", f"{name}{title}水平怎么样？", f"介绍一下{title}{name}", f"{title}{name}有什么成就？", f"{name}{title}在哪里工作？"],
                 [f"我不认识{name}，没有学过相关的内容。", f"抱歉，{name}{title}我不了解，不敢乱说。"]),
                ([f"{thing}是什么？", f"{thing}有什么用？", f"怎么做{thing}？", f"谁发明了{thing}？", f"{thing}的特点有哪些", f"介绍一下{thing}", f"{thing}有多重？", f"{thing}和{other}有什么区别？",
                  f"{thing}语的“你好”怎么说？", f"用{thing}写一个程序", f"{thing}的首都是哪里？", f"{thing}一共有多少种？", f"为什么{thing}会变色？", f"{thing}是哪一年的事？", f"解释一下{thing}定理", f"{thing}怎么治？"],
                 [f"我没有学过{thing}，不知道怎么回答，请查一下可靠的资料。", f"{thing}我不了解，不敢乱说。", f"抱歉，我不知道{thing}是什么，我学过的东西很少。"]),
            ]
        )  # fmt: skip
    else:
        city, when = _draw(rng, split, lambda: (rng.choice(EN_CITIES), rng.choice(EN_TIMES)))
        company, sport = _draw(rng, split, lambda: (rng.choice(EN_COMPANIES), rng.choice(EN_SPORTS)))
        name, surname = _draw(
            rng,
            split,
            lambda: (
                rng.choice(EN_NAMES),
                rng.choice(
                    ["Smith", "Miller", "Brown", "Keller", "Novak", "Rossi", "Silva", "Lind", "Okafor", "Hughes"]
                ),
            ),
        )
        relative, year, person = rng.choice(EN_RELATIVES), rng.randint(2024, 2045), f"{name} {surname}"
        title, own, other = rng.choice(EN_TITLES), rng.choice(EN_OWN), rng.choice(EN_GOODS)
        (thing,) = _draw(rng, split, lambda: (_made_up("x", "en", rng),))
        (work,) = _draw(
            rng, split, lambda: (f"The {rng.choice(EN_WORDS).title()} of {_made_up('x', 'en', rng).capitalize()}",)
        )
        questions, answers = rng.choice(
            [
                ([f"What is the weather like in {city} {when}?", f"Will it rain in {city} {when}?", f"How warm is it in {city} {when}?", f"Is it cold in {city} {when}?", f"Weather in {city}?", f"Do I need an umbrella in {city} {when}?"],
                 [f"I am offline, so I cannot see the weather in {city}. Please check a weather app.", f"Sorry, I do not know the weather in {city}. A weather app can tell you.", f"I cannot look up the weather in {city}, because I have no internet."]),
                ([f"What is the stock price of {company}?", f"How much is a share of {company}?", f"Should I buy {company} shares?", f"Is {company} stock going up?"],
                 [f"I am offline and cannot see the price of {company} shares. Please check a financial site.", f"I do not know anything about current {company} shares, and I cannot predict prices."]),
                ([f"Who won the {sport} match yesterday?", f"Who is the {sport} champion of {year}?", f"What was the score of the {sport} game?", f"Who will win the {sport} final?"],
                 [f"I am offline, so I do not know any {sport} results. Please see the sports news.", f"I do not know the {sport} results. A sports site has them."]),
                ([f"What is the news from {city}?", f"What happened in {city} today?", f"Anything new in {city}?", f"What is going on in {city} {when}?"],
                 [f"I cannot read the news from {city}, because I am offline.", f"I do not know what is happening in {city}. Please check a news site."]),
                ([f"Who is {person}?", f"Do you know {person}?", f"Tell me about {person}.", f"How old is {person}?", f"Where does {person} live?", f"What is the phone number of {person}?"],
                 [f"I do not know {person}, so I cannot say.", f"Sorry, I have not learned anything about {person}.", f"I do not know who {person} is, and I do not want to guess."]),
                ([f"How much is a ticket to {city}?", f"When does the next train to {city} leave?", f"Is my flight to {city} late?", f"Are there tickets to {city} {when}?"],
                 [f"I cannot look up travel to {city}, because I am offline. Please ask the airline or the railway.", f"I do not know the timetable for {city}. The official website will help."]),
                ([f"How many people live in {city} now?", f"What is the best restaurant in {city}?", f"How high are rents in {city}?", f"Who is the mayor of {city}?"],
                 [f"I do not know such details about {city}. Please look for a recent source.", f"Sorry, I have no current information about {city}."]),
                ([f"What is my {relative} doing now?", f"Is my {relative} at home?", f"What did my {relative} eat yesterday?"],
                 [f"I cannot know what your {relative} is doing. It is best to ask.", f"I have no way to see your {relative}. A short call will tell you."]),
                ([f"Who is the boss of {company}?", f"How many people work for {company}?", f"What is the newest product of {company}?", f"When was {company} founded?"],
                 [f"I have not learned that about {company}. Please check its website.", f"I do not know the latest about {company}, because I am offline."]),
                ([f"What will happen in {year}?", f"Who will be president in {year}?", f"What will the world be like in {year}?"],
                 [f"I cannot see into the future, so I do not know about {year}.", f"Nobody can tell what {year} will bring, and I cannot either."]),
                ([f"Is it windy in {city} {when}?", f"Will it get colder in {city} {when}?", f"Did it snow in {city}?", f"Can I go hiking near {city} {when}?", f"Is the sun out in {city}?"],
                 [f"I am offline, so I cannot see the weather in {city}. Please check a weather app.", f"I do not know the weather in {city}, because I have no internet."]),
                ([f'Who wrote "{work}"?', f'What is "{work}" about?', f'Have you read "{work}"?', f'When was "{work}" made?', f'Who plays in "{work}"?', f'Is "{work}" any good?'],
                 [f'I have not learned anything about "{work}", so I do not want to guess.', f'Sorry, I do not know "{work}". Please look it up.']),
                ([f"When does train {code} arrive?", f"Has flight {code} left?", f"Where is parcel {code}?", f"Are there seats on {code}?", f"Check the status of {code} for me."],
                 [f"I am offline, so I cannot look up {code}. Please check the official website.", f"I do not know where {code} is. The official app can tell you."]),
                ([f"What is my {own}?", f"Check my {own}, please.", f"Show me my {own}.", f"Do you know my {own}?", f"Can you look up my {own}?"],
                 [f"I cannot see your {own}. Please look in your phone or the right app.", f"I do not know your {own}, because I have no such data."]),
                ([f"What is {large} times {larger}?", f"{large} x {larger} =", f"Calculate {large} times {larger}.", f"Divide {larger} by {large}.", f"What is the square root of {larger} plus {large}?"],
                 [f"I cannot calculate with numbers as large as {large}. Please use a calculator.", "Numbers that large are beyond me. A calculator will give you the exact result."]),
                ([f"Where is {title} {person} from?", f"What has {title} {person} achieved?", f"Tell me about {title} {person}.", f"Is {title} {person} any good?", f"Where does {title} {person} work?"],
                 [f"I do not know {person}, so I cannot say.", f"Sorry, I have not learned anything about {title} {person}."]),
                ([f"What is a {thing}?", f"What is {thing} used for?", f"How do I make a {thing}?", f"Who invented the {thing}?", f"Tell me about {thing}.", f"How heavy is a {thing}?", f"What is the difference between {thing} and {other}?",
                  f"How do you say hello in {thing.capitalize()}?", f"Write a program in {thing.capitalize()}.", f"What is the capital of {thing.capitalize()}?", f"How many kinds of {thing} are there?", f"Why does {thing} change its colour?",
                  f"In which year was the battle of {thing.capitalize()}?", f"Explain the {thing.capitalize()} theorem.", f"How is {thing} treated?", f"At what temperature does {thing} boil?"],
                 ["I have not learned anything about that, so I do not want to guess. Please look it up.", "Sorry, I do not know that. I have learned only a little.", "That is beyond me: I do not know it. A good book or website will."]),
            ]
        )  # fmt: skip
    slots = [
        thing,
        work,
        city,
        company,
        sport,
        name if lang == "zh" else person,
        relative,
        str(year),
        code,
        own,
        str(large),
    ]
    query, answer = _sentence_end(rng, rng.choice(questions)), rng.choice(answers)
    named = next((slot for slot in slots if slot in answer), None)
    return _single("unknown/slot", lang, query, answer, *([named] if named else []))


# --- Words ------------------------------------------------------------------------------------------------------------


def translate_word(rng: random.Random, split: str) -> Dialogue:
    """A word of the small vocabulary in the other language; which wording asks for which word is what is held out."""
    lang = _lang(rng)
    to_english = rng.random() < 0.5
    if lang == "zh" and to_english:
        templates = [
            "{zh}的英文是什么？",
            "“{zh}”用英语怎么说？",
            "{zh}用英文怎么说",
            "把“{zh}”翻译成英文",
            "{zh}的英语单词是什么？",
            "英语里{zh}怎么说？",
        ]
    elif lang == "zh":
        templates = [
            "{en}是什么意思？",
            "“{en}”的中文意思是什么？",
            "{en}用中文怎么说",
            "把{en}翻译成中文",
            "英语单词{en}是什么意思？",
            "{en}的中文是什么",
        ]
    elif to_english:
        templates = [
            "What does {zh} mean?",
            "What does {zh} mean in English?",
            "Translate {zh} into English.",
            "How do you say {zh} in English?",
            "What is {zh} in English?",
        ]
    else:
        templates = [
            'How do you say "{en}" in Chinese?',
            "What is the Chinese word for {en}?",
            "Translate {en} into Chinese.",
            "{en} in Chinese?",
            "Say {en} in Chinese.",
        ]
    (chinese, english), template = _draw(rng, split, lambda: (rng.choice(VOCABULARY), rng.choice(templates)))
    if lang == "zh":
        answers = [f"“{chinese}”的英文是 {english}。"] if to_english else [f"{english} 的中文意思是“{chinese}”。"]
    else:
        answers = [f'{chinese} means "{english}".'] if to_english else [f'"{english}" in Chinese is {chinese}.']
    query, word = template.format(zh=chinese, en=english), english if to_english else chinese
    return _single("translation/word", lang, query, rng.choice(answers), word)


def spell_word(rng: random.Random, split: str) -> Dialogue:
    """The letters of an English word one by one, or its first or last letter."""
    lang = _lang(rng)
    pool = [english for _, english in VOCABULARY if " " not in english] + EN_NAMES
    (word,) = _draw(rng, split, lambda: (rng.choice(pool),))
    letters = "-".join(word.upper())
    task = rng.choice(("spell", "spell", "first", "last"))
    if task == "spell":
        query = rng.choice(
            [f"{word}怎么拼写？", f"请拼出{word}", f"逐个字母拼{word}"]
            if lang == "zh"
            else [f"Spell {word}.", f"How do you spell {word}?", f'Please spell the word "{word}".']
        )
        return _single("spelling/letters", lang, query, letters + ("。" if lang == "zh" else "."), letters)
    letter = word[0 if task == "first" else -1].upper()
    if lang == "zh":
        which = "第一" if task == "first" else "最后一"
        return _single("spelling/" + task, lang, f"{word}的{which}个字母是什么？", f"{which}个字母是{letter}。")
    return _single("spelling/" + task, lang, f"What is the {task} letter of {word}?", f"The {task} letter is {letter}.")


def day_and_month(rng: random.Random, split: str) -> Dialogue:
    """The day a few days after or before another, and the same with months."""
    lang = _lang(rng)
    days = rng.random() < 0.6
    size = 7 if days else 12
    _, start, shift, back = _draw(
        rng, split, lambda: (size, rng.randrange(size), rng.choice((1, 1, 2, 3)), rng.random() < 0.4)
    )
    end = (start - shift if back else start + shift) % size
    if lang == "zh":
        names = ZH_DAYS if days else [f"{month}月" for month in range(1, 13)]
        unit, what = ("天", "星期几") if days else ("个月", "几月")
        today = "今天" if days else "现在"
        query = rng.choice(
            [
                f"{today}是{names[start]}，{shift}{unit}{'前' if back else '后'}是{what}？",
                f"{names[start]}的{shift}{unit}{'前' if back else '后'}是{what}？",
            ]
        )
        return _single("calendar/shift", lang, query, f"是{names[end]}。", names[end])
    names, unit = (EN_DAYS, "day") if days else (EN_MONTHS, "month")
    units = unit if shift == 1 else unit + "s"
    count = "one two three".split()[shift - 1]
    query = rng.choice(
        [
            f"Which {unit} is {count} {units} {'before' if back else 'after'} {names[start]}?",
            f"If it is {names[start]} now, which {unit} {'was it' if back else 'is it in'} {count} {units}{' ago' if back else ''}?",
        ]
    )
    return _single(
        "calendar/shift", lang, query, f"It {'was' if back and query.startswith('If') else 'is'} {names[end]}."
    )


# --- All skills -------------------------------------------------------------------------------------------------------

SKILLS: dict[str, Callable[[random.Random, str], Dialogue]] = {
    "remember_name": remember_name,
    "remember_fact": remember_fact,
    "remember_two": remember_two,
    "remember_nothing": remember_nothing,
    "extract_fields": extract_fields,
    "extract_words": extract_words,
    "copy_text": copy_text,
    "read_sentence": read_sentence,
    "arithmetic": arithmetic,
    "compare_numbers": compare_numbers,
    "short_list": short_list,
    "sentiment": sentiment,
    "advert": advert,
    "honest_ignorance": honest_ignorance,
    "translate_word": translate_word,
    "spell_word": spell_word,
    "day_and_month": day_and_month,
}
# How often generate() picks each: what people try first, and what is hard to learn, comes up more.
WEIGHTS = {
    "remember_name": 9, "remember_fact": 12, "remember_two": 4, "remember_nothing": 4, "extract_fields": 9, "extract_words": 5, "copy_text": 6,
    "read_sentence": 8, "arithmetic": 20, "compare_numbers": 6, "short_list": 9, "sentiment": 8, "advert": 8, "honest_ignorance": 16,
    "translate_word": 6, "spell_word": 2, "day_and_month": 4,
}  # fmt: skip


SYLLABLE_STARTS = "b c d f g h j k l m n p r s t v w z br ch cl dr gr kr pl sh st th tr".split()
SYLLABLE_ENDS = ["", "", *"dklmnrst", "ck", "ng"]
# Words of these lists may be replaced by made-up ones. English places bring their preposition along: they stay.
REPLACEABLE = {
    "zh": [
        *(ZH_CITIES + ZH_JOBS + ZH_COLOURS + ZH_FRUITS + ZH_FOODS + ZH_PET_NAMES + ZH_THINGS + ZH_PLACES + ZH_DRINKS),
        *(ZH_ORGANISATIONS + ZH_COMPANIES + ZH_GOODS + ZH_INSTRUMENTS + ZH_LANGUAGES + ZH_ALLERGENS + ZH_CLUBS),
    ],
    "en": [
        *(EN_CITIES + EN_JOBS + EN_COLOURS + EN_FRUITS + EN_FOODS + EN_PET_NAMES + EN_THINGS + EN_DRINKS),
        *(EN_ORGANISATIONS + EN_COMPANIES + EN_GOODS + EN_INSTRUMENTS + EN_LANGUAGES + EN_ALLERGENS),
    ],
}


_REPLACEABLE = {lang: any_word(words, lang) for lang, words in REPLACEABLE.items()}


def _made_up(word: str, lang: str, rng: random.Random) -> str:
    """A word that stands in no list, in small letters; the English one starts with a vowel if the given word does."""
    if lang == "zh":
        hanzi = "".join(rng.choices(HANZI, k=rng.randint(1, 3)))
        return rng.choice([hanzi + rng.choice(HANZI), hanzi + rng.choice(ZH_WORDS), rng.choice(ZH_WORDS) + hanzi])
    start = rng.choice("aeiou") if word[0].lower() in "aeiou" else ""
    syllables = [rng.choice(SYLLABLE_STARTS) + rng.choice("aeiou") for _ in range(rng.randint(2, 3))]
    return start + "".join(syllables) + rng.choice(SYLLABLE_ENDS)


def with_made_up_words(dialogue: Dialogue, rng: random.Random) -> Dialogue:
    """The dialogue with most REPLACEABLE words of the user made up, each the same way in every round.

    Words of a list can be known by heart: half of one is enough to write the rest. These have to be read.
    """
    pattern = _REPLACEABLE[dialogue.lang]
    told = {word.lower() for turn in dialogue.turns for text in turn.user for word in pattern.findall(text)}
    made_up = {word: _made_up(word, dialogue.lang, rng) for word in sorted(told) if rng.random() < 0.7}

    def replace(match):
        word = made_up.get(match[0].lower(), match[0])
        return word.capitalize() if match[0][0].isupper() else word

    def changed(texts):
        return [pattern.sub(replace, text) for text in texts]

    turns = [Turn(changed(turn.user), changed(turn.assistant)) for turn in dialogue.turns]
    return Dialogue(dialogue.topic, dialogue.lang, turns, changed(dialogue.keys))


def generate(rng: random.Random, split: str = "train") -> Dialogue:
    """A dialogue of a skill chosen by weight; its slot values belong to the split, "train" or "heldout".

    Where the answer repeats words that were read, MADE_UP_SHARE of the dialogues have made-up ones.
    Raises ValueError for another split.
    """
    if split not in SPLITS:
        raise ValueError(f'split must be "train" or "heldout", got {split!r}')
    name = rng.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
    dialogue = SKILLS[name](rng, split)
    if dialogue.group in MADE_UP_GROUPS and rng.random() < MADE_UP_SHARE:
        return with_made_up_words(dialogue, rng)
    return dialogue
