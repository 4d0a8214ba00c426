//! Plots as SVG text. Colours come from the page's style sheet, so that one plot serves light and dark.

use std::fmt::Write;

const WIDTH: f64 = 480.0;
const HEIGHT: f64 = 280.0;
const LEFT: f64 = 52.0;
const RIGHT: f64 = 12.0;
const TOP: f64 = 12.0;
const BOTTOM: f64 = 40.0;
/// Classes `s0` to `s5` of the style sheet.
const COLOURS: usize = 6;

/// One line of a plot.
pub(crate) struct Series {
    pub(crate) name: String,
    /// Drawn as a ceiling: grey, without points.
    pub(crate) is_limit: bool,
    /// (x, y, what to show on hovering).
    pub(crate) points: Vec<(f64, f64, String)>,
}

/// How the y axis is divided.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Scale {
    /// Evenly, with a line at 1.
    Ratio,
    /// By powers of ten.
    Logarithmic,
}

/// Lines over M, which is drawn by powers of two. Empty where there is no point.
pub(crate) fn lines(title: &str, y_label: &str, scale: Scale, series: &[Series]) -> String {
    let points = || series.iter().flat_map(|series| &series.points);
    let valid = |value: f64| value.is_finite() && value > 0.0;
    let (mut x, mut y) = (Axis::EMPTY, Axis::EMPTY);
    for (at_x, at_y, _) in points().filter(|(x, y, _)| valid(*x) && valid(*y)) {
        x.include(at_x.log2());
        y.include(if scale == Scale::Logarithmic { at_y.log10() } else { *at_y });
    }
    if x.low > x.high {
        return String::new();
    }
    match scale {
        Scale::Ratio => {
            y.include(1.0);
            y = y.widened(0.05);
        }
        Scale::Logarithmic => y = Axis { low: y.low.floor(), high: y.high.ceil().max(y.low.floor() + 1.0) },
    }
    let x = x.widened(0.02);
    let at_x = |m: f64| LEFT + x.share(m.log2()) * (WIDTH - LEFT - RIGHT);
    let height = |value: f64| if scale == Scale::Logarithmic { value.log10() } else { value };
    let at_y = |value: f64| HEIGHT - BOTTOM - y.share(height(value)) * (HEIGHT - TOP - BOTTOM);

    let mut svg = open(title);
    for value in ticks(y, scale) {
        grid(&mut svg, at_y(value), &number(value), scale == Scale::Ratio && value == 1.0);
    }
    let powers = x.low.ceil() as i32..=x.high.floor() as i32;
    // More labels than these would touch.
    let every = if powers.clone().count() > 8 { 2 } else { 1 };
    for power in powers.step_by(every) {
        let m = f64::from(power).exp2();
        text(&mut svg, at_x(m), HEIGHT - BOTTOM + 16.0, "middle", &number(m));
    }
    axis_labels(&mut svg, "M", y_label);
    for (index, series) in series.iter().enumerate() {
        let class = if series.is_limit { "limit".into() } else { format!("s{}", index % COLOURS) };
        let seen: Vec<_> = series.points.iter().filter(|(x, y, _)| valid(*x) && valid(*y)).collect();
        let path: Vec<String> = seen.iter().map(|(x, y, _)| format!("{:.1},{:.1}", at_x(*x), at_y(*y))).collect();
        let _ = write!(svg, r#"<polyline class="{class}" points="{}"/>"#, path.join(" "));
        for (x, y, hint) in seen.into_iter().filter(|_| !series.is_limit) {
            let _ = write!(
                svg,
                r#"<circle class="{class}" cx="{:.1}" cy="{:.1}" r="3"><title>{}</title></circle>"#,
                at_x(*x),
                at_y(*y),
                escape(hint)
            );
        }
    }
    svg + "</svg>" + &legend(series)
}

/// As [`lines`], to stand in a file of its own, light or dark as the viewer is; its legend is below.
pub(crate) fn file(title: &str, y_label: &str, scale: Scale, series: &[Series]) -> String {
    const STYLE: &str = "svg{font:12px sans-serif;background:#fff;color:#1c1e21;--c0:#0b62c4;--c1:#b3541e;--c2:#1a7f4b;\
        --c3:#8a3ab9;--c4:#b0203f;--c5:#5c6b00}@media(prefers-color-scheme:dark){svg{background:#15171a;color:#e6e8eb;\
        --c0:#6cb0ff;--c1:#ffa061;--c2:#5fd39a;--c3:#d19bf5;--c4:#ff8097;--c5:#c8d860}}text{fill:currentColor}\
        polyline{fill:none;stroke-width:2}.grid,.one{stroke:currentColor;opacity:.25}.one{opacity:.7}";
    let drawn = lines(title, y_label, scale, series);
    // Without a point nothing is drawn.
    let inside =
        drawn.split_once("</title>").and_then(|(_, rest)| rest.split_once("</svg>")).map_or("", |(svg, _)| svg);
    let height = HEIGHT + 18.0 * (series.len() + 1) as f64;
    let mut svg = format!(
        r#"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}"><title>{}</title><style>{STYLE}"#,
        escape(title)
    );
    for colour in 0..COLOURS {
        let _ = write!(svg, "polyline.s{colour}{{stroke:var(--c{colour})}}");
        let _ = write!(svg, "circle.s{colour},text.s{colour}{{fill:var(--c{colour})}}");
    }
    svg += "</style>";
    svg += inside;
    for (index, series) in series.iter().enumerate() {
        let (y, colour) = (HEIGHT + 18.0 * index as f64 + 12.0, index % COLOURS);
        let _ = write!(svg, r#"<text class="s{colour}" x="{LEFT}" y="{y:.1}">{}</text>"#, escape(&series.name));
    }
    svg + "</svg>\n"
}

/// Bars side by side, each with its count above.
pub(crate) fn bars(title: &str, x_label: &str, y_label: &str, bars: &[(String, usize)]) -> String {
    let most = bars.iter().map(|(_, count)| *count).max().unwrap_or(0);
    if most == 0 {
        return String::new();
    }
    let step = (WIDTH - LEFT - RIGHT) / bars.len() as f64;
    let mut svg = open(title);
    for (index, (name, count)) in bars.iter().enumerate() {
        let x = LEFT + step * index as f64;
        let height = *count as f64 / most as f64 * (HEIGHT - TOP - BOTTOM - 16.0);
        let y = HEIGHT - BOTTOM - height;
        let _ = write!(
            svg,
            r#"<rect class="s0" x="{:.1}" y="{y:.1}" width="{:.1}" height="{height:.1}"/>"#,
            x + 2.0,
            step - 4.0
        );
        text(&mut svg, x + step / 2.0, y - 4.0, "middle", &count.to_string());
        text(&mut svg, x + step / 2.0, HEIGHT - BOTTOM + 16.0, "middle", name);
    }
    axis_labels(&mut svg, x_label, y_label);
    svg + "</svg>"
}

#[derive(Clone, Copy)]
struct Axis {
    low: f64,
    high: f64,
}

impl Axis {
    const EMPTY: Self = Self { low: f64::INFINITY, high: f64::NEG_INFINITY };

    fn include(&mut self, value: f64) {
        (self.low, self.high) = (self.low.min(value), self.high.max(value));
    }

    /// With a margin, and never without extent.
    fn widened(self, share: f64) -> Self {
        let margin = ((self.high - self.low) * share).max(0.1);
        Self { low: self.low - margin, high: self.high + margin }
    }

    fn share(self, value: f64) -> f64 {
        (value - self.low) / (self.high - self.low)
    }
}

fn ticks(axis: Axis, scale: Scale) -> Vec<f64> {
    match scale {
        Scale::Logarithmic => (axis.low as i32..=axis.high as i32).map(|power| 10_f64.powi(power)).collect(),
        Scale::Ratio => {
            let step = [0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 5.0, 10.0, 50.0].into_iter();
            let step = step.chain([f64::MAX]).find(|step| (axis.high - axis.low) / step <= 8.0).unwrap_or(f64::MAX);
            let count = |value: f64| (value / step).round() as i64;
            let steps = count(axis.low)..=count(axis.high);
            steps.map(|at| at as f64 * step).filter(|value| (axis.low..=axis.high).contains(value)).collect()
        }
    }
}

fn open(title: &str) -> String {
    format!(
        r#"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img"><title>{}</title>"#,
        escape(title)
    )
}

fn grid(svg: &mut String, y: f64, label: &str, is_one: bool) {
    let class = if is_one { "one" } else { "grid" };
    let _ = write!(svg, r#"<line class="{class}" x1="{LEFT}" x2="{}" y1="{y:.1}" y2="{y:.1}"/>"#, WIDTH - RIGHT);
    text(svg, LEFT - 6.0, y + 4.0, "end", label);
}

fn axis_labels(svg: &mut String, x: &str, y: &str) {
    text(svg, (LEFT + WIDTH - RIGHT) / 2.0, HEIGHT - 6.0, "middle", x);
    let middle = (TOP + HEIGHT - BOTTOM) / 2.0;
    let _ = write!(
        svg,
        r#"<text x="12" y="{middle:.1}" text-anchor="middle" transform="rotate(-90 12 {middle:.1})">{}</text>"#,
        escape(y)
    );
}

fn text(svg: &mut String, x: f64, y: f64, anchor: &str, text: &str) {
    let _ = write!(svg, r#"<text x="{x:.1}" y="{y:.1}" text-anchor="{anchor}">{}</text>"#, escape(text));
}

fn legend(series: &[Series]) -> String {
    let item = |(index, series): (usize, &Series)| {
        let class = if series.is_limit { "limit".into() } else { format!("s{}", index % COLOURS) };
        format!(r#"<li class="{class}">{}</li>"#, escape(&series.name))
    };
    format!(r#"<ul class="legend">{}</ul>"#, series.iter().enumerate().map(item).collect::<String>())
}

/// Without digits that say nothing.
fn number(value: f64) -> String {
    format!("{:.2}", value).trim_end_matches('0').trim_end_matches('.').to_owned()
}

/// Text inside an element or attribute.
fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn series(name: &str, points: &[(f64, f64)]) -> Series {
        let points = points.iter().map(|&(x, y)| (x, y, format!("{x} < {y}"))).collect();
        Series { name: name.into(), is_limit: false, points }
    }

    #[test]
    fn plots_are_well_formed_whatever_the_numbers_and_names() {
        let odd = [(1.0, 1.0), (1.0, f64::NAN), (f64::INFINITY, 2.0), (0.0, 3.0), (4.0, -1.0), (8192.0, 1e9)];
        for scale in [Scale::Ratio, Scale::Logarithmic] {
            for points in [&odd[..1], &odd[..], &[(16.0, 0.97), (32.0, 1.3)]] {
                let plot = lines("a < b & \"c\"", "<y>", scale, &[series("K < N", points), series("&", &[])]);
                let plot = format!("<div>{plot}</div>");
                let document = roxmltree::Document::parse(&plot).unwrap();
                assert!(!plot.contains("NaN") && !plot.contains("inf"), "{plot}");
                assert!(document.descendants().any(|node| node.has_tag_name("li")));
            }
            assert_eq!(lines("", "", scale, &[series("none", &odd[1..4])]), "");
        }
        let plot = bars("x", "<", ">", &[("1 < 2".into(), 3), ("b".into(), 0)]);
        roxmltree::Document::parse(&plot).unwrap();
        assert_eq!(bars("x", "", "", &[("a".into(), 0)]), "");
    }

    #[test]
    fn every_point_is_drawn_inside_the_frame() {
        let plot = lines("t", "y", Scale::Ratio, &[series("a", &[(1.0, 0.5), (64.0, 1.0), (8192.0, 4.0)])]);
        let svg = plot.split("<ul").next().unwrap();
        let document = roxmltree::Document::parse(svg).unwrap();
        let circles: Vec<_> = document.descendants().filter(|node| node.has_tag_name("circle")).collect();
        assert_eq!(circles.len(), 3);
        for circle in circles {
            let at = |name| circle.attribute(name).unwrap().parse::<f64>().unwrap();
            assert!((LEFT..=WIDTH - RIGHT).contains(&at("cx")) && (TOP..=HEIGHT - BOTTOM).contains(&at("cy")));
        }
    }
}
