"""Asks a GPPC model what a change of some genes would do to a cell."""

import gradio as gr
from demo_prediction import COLUMNS, load_pipeline, predict_table

MODEL = "USER/MODEL"
predict = load_pipeline(MODEL)


def answer(file, perturbation, top_k):
    """What the button does: a table, or the reason why there is none."""
    try:
        return predict_table(predict, file, perturbation, int(top_k))
    except ValueError as error:
        raise gr.Error(str(error)) from error


demo = gr.Interface(
    fn=answer,
    inputs=[
        gr.File(label="Counts of one cell: two columns, gene and count (csv or tsv)", type="filepath"),
        gr.Textbox(label="Perturbation", value="STAT1=ko", info="ko, kd:0.8, x3, level:2.0, delta:-1.3; join with +"),
        gr.Slider(5, 200, value=30, step=5, label="Genes to show"),
    ],
    outputs=gr.Dataframe(headers=COLUMNS, label="Genes that change most"),
    title="Gene Perturbation Predictor from Correlates",
    description="Predictions come from how genes vary together in unperturbed cells. Correlation is not causation: "
    "read them as hypotheses. Research use only.",
    flagging_mode="never",
)

if __name__ == "__main__":
    demo.launch()
