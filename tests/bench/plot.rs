//! A plot with two logarithmic axes, as SVG.

use std::fmt::Write;

/// One line.
pub(crate) struct Line {
    pub(crate) name: &'static str,
    pub(crate) color: &'static str,
    /// Ascending.
    pub(crate) points: Vec<(f64, f64)>,
}

const WIDTH: f64 = 720.0;
const HEIGHT: f64 = 420.0;
const LEFT: f64 = 60.0;
const RIGHT: f64 = 180.0;
const TOP: f64 = 40.0;
const BOTTOM: f64 = 50.0;

/// The powers of ten around these values.
fn decades(values: impl Iterator<Item = f64> + Clone) -> (i32, i32) {
    let low = values.clone().fold(f64::INFINITY, f64::min).log10().floor();
    let high = values.fold(0.0, f64::max).log10().ceil();
    (low as i32, high as i32)
}

/// The picture.
pub(crate) fn plot(title: &str, below: &str, lines: &[Line]) -> String {
    let points = lines.iter().flat_map(|line| &line.points);
    let ((x_low, x_high), (y_low, y_high)) =
        (decades(points.clone().map(|point| point.0)), decades(points.map(|point| point.1)));
    let along = |value: f64, low: i32, high: i32| (value.log10() - f64::from(low)) / f64::from(high - low);
    let x = |value| LEFT + along(value, x_low, x_high) * (WIDTH - LEFT - RIGHT);
    let y = |value| HEIGHT - BOTTOM - along(value, y_low, y_high) * (HEIGHT - TOP - BOTTOM);
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"{WIDTH}\" height=\"{HEIGHT}\" fill=\"#fff\"/>\n\
         <text x=\"{LEFT}\" y=\"24\" font-size=\"15\">{title}</text>\n\
         <text x=\"{LEFT}\" y=\"{}\">{below}</text>\n",
        HEIGHT - 12.0
    );
    let (right, bottom) = (WIDTH - RIGHT, HEIGHT - BOTTOM);
    for power in x_low..=x_high {
        let (value, at) = (10f64.powi(power), x(10f64.powi(power)));
        let _ = writeln!(
            svg,
            "<path d=\"M{at:.1} {TOP}V{bottom}\" stroke=\"#ddd\"/><text x=\"{at:.1}\" y=\"{}\" text-anchor=\"middle\">{value}</text>",
            bottom + 16.0
        );
    }
    for power in y_low..=y_high {
        let (value, at) = (10f64.powi(power), y(10f64.powi(power)));
        let _ = writeln!(
            svg,
            "<path d=\"M{LEFT} {at:.1}H{right}\" stroke=\"#ddd\"/><text x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{value}</text>",
            LEFT - 6.0,
            at + 4.0
        );
    }
    for (number, Line { name, color, points }) in lines.iter().enumerate() {
        let path: Vec<String> =
            points.iter().map(|point| format!("{:.1} {:.1}", x(point.0), y(point.1))).collect();
        let _ = writeln!(
            svg,
            "<path d=\"M{}\" fill=\"none\" stroke=\"{color}\" stroke-width=\"2\"/>",
            path.join("L")
        );
        for point in points {
            let _ = writeln!(
                svg,
                "<circle cx=\"{:.1}\" cy=\"{:.1}\" r=\"3\" fill=\"{color}\"/>",
                x(point.0),
                y(point.1)
            );
        }
        let at = TOP + 14.0 + 20.0 * number as f64;
        let _ = writeln!(svg, "<text x=\"{}\" y=\"{at}\" fill=\"{color}\">{name}</text>", right + 10.0);
    }
    svg + "</svg>\n"
}
