//! The page of `report --html` in a browser: `cargo test -p swiglu-tune --test page -- --ignored`, with Debian's chromium.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

mod home;

use home::{Home, SHIPPED};
use serde_json::Value;
use std::process::Command;

/// Runs first in the page: notes what goes wrong.
const WATCH: &str = "<script>window.wrong = []; window.onerror = message => { wrong.push(String(message)); };\
    console.error = console.warn = (...words) => { wrong.push(words.join(' ')); };</script>";

/// Looks at the page in its frame, sorts every table both ways, and leaves what it saw in the outer document.
const LOOK: &str = r##"<script>
const frame = document.querySelector("iframe");
frame.onload = () => {
  const page = frame.contentWindow, body = page.document.body, root = page.document.documentElement;
  const style = page.getComputedStyle(body);
  for (const details of page.document.querySelectorAll("details")) details.open = true;
  const sorts = Array.from(page.document.querySelectorAll("table")).map(table => {
    const buttons = Array.from(table.querySelectorAll("th button"));
    return buttons.every((button, column) => ["ascending", "descending"].every(order => {
      button.click();
      const texts = Array.from(table.tBodies[0].rows, row => row.cells[column].textContent);
      const numbers = texts.map(parseFloat).filter(number => !Number.isNaN(number));
      const rising = numbers.every((number, at) => at === 0 || numbers[at - 1] <= number);
      const falling = numbers.every((number, at) => at === 0 || numbers[at - 1] >= number);
      return button.parentElement.getAttribute("aria-sort") === order && (order === "ascending" ? rising : falling);
    }));
  });
  const seen = { wrong: page.wrong, width: page.innerWidth, scrolls: root.scrollWidth, sorts,
    dark: page.matchMedia("(prefers-color-scheme: dark)").matches, back: style.backgroundColor, text: style.color,
    plots: page.document.querySelectorAll("svg").length };
  const result = document.createElement("pre");
  result.id = "seen";
  result.textContent = JSON.stringify(seen);
  document.body.append(result);
};
frame.srcdoc = PAGE;
</script>"##;

/// What a browser of this width and scheme sees of `page`.
fn look(home: &Home, page: &str, width: u32, is_dark: bool) -> Value {
    let watched = page.replacen("<head>", &format!("<head>{WATCH}"), 1);
    // Inside a script `</` would end it.
    let quoted = serde_json::to_string(&watched).unwrap().replace("</", "<\\/");
    let frame = format!(
        "<!DOCTYPE html><meta charset=\"utf-8\"><iframe width=\"{width}\" height=\"800\"></iframe>{}",
        LOOK.replacen("PAGE", &quoted, 1)
    );
    let path = home.write("frame.html", &frame);
    let profile = home.path().join("profile");
    let mut browser = Command::new("chromium");
    browser.args(["--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", "--virtual-time-budget=5000"]);
    browser.arg(format!("--user-data-dir={}", profile.display())).arg("--window-size=1600,1000");
    browser.arg(format!("--blink-settings=preferredColorScheme={}", u8::from(!is_dark)));
    let output = browser.arg(format!("file://{path}")).output().unwrap_or_else(|error| panic!("chromium: {error}"));
    let dom = String::from_utf8_lossy(&output.stdout).into_owned();
    let seen = dom.split_once("<pre id=\"seen\">").and_then(|(_, rest)| rest.split_once("</pre>"));
    let Some((seen, _)) = seen else {
        panic!("nothing was seen: {}", String::from_utf8_lossy(&output.stderr));
    };
    serde_json::from_str(&seen.replace("&gt;", ">").replace("&lt;", "<").replace("&amp;", "&")).unwrap()
}

/// Brightness of `rgb(…)`, 0 to 255.
fn brightness(colour: &str) -> f64 {
    let numbers = colour.trim_start_matches(|c: char| !c.is_ascii_digit()).trim_end_matches(')');
    numbers.split(',').take(3).map(|number| number.trim().parse::<f64>().unwrap()).sum::<f64>() / 3.0
}

#[test]
#[ignore = "needs chromium"]
fn the_page_is_whole_in_light_in_dark_and_on_a_phone() {
    let home = Home::new();
    home.tune_cpu("[1, 2, 5, 8]").success();
    home.tune(&["db", "import", SHIPPED]).success();
    let path = home.path().join("report.html");
    home.tune(&["report", "--html", &path.display().to_string()]).success();
    let page = std::fs::read_to_string(path).unwrap();
    for (width, is_dark) in [(1280, false), (1280, true), (390, false), (390, true)] {
        let seen = look(&home, &page, width, is_dark);
        assert_eq!(seen["wrong"], Value::Array(Vec::new()), "errors at width {width}");
        assert_eq!((&seen["width"], &seen["dark"]), (&width.into(), &is_dark.into()), "{seen}");
        assert!(seen["scrolls"].as_u64().unwrap() <= width.into(), "wider than {width}: {seen}");
        assert!(seen["plots"].as_u64().unwrap() > 5);
        let sorts = seen["sorts"].as_array().unwrap();
        assert!(sorts.len() > 5 && sorts.iter().all(|sorts| sorts == true), "a table does not sort: {sorts:?}");
        let [back, text] = ["back", "text"].map(|name| brightness(seen[name].as_str().unwrap()));
        assert!(if is_dark { text - back > 120.0 } else { back - text > 120.0 }, "{seen}");
    }
}
